"""Local Lipschitz constants of several trained networks over the same test images, as numbers and in one picture.

    robust train --recipe digits_mtl_ibp --out runs/certified
    robust train --recipe digits_mtl_ibp --objective natural --out runs/natural
    python scripts/bench/lipschitz_nets.py certified=runs/certified/checkpoint.safetensors \
        natural=runs/natural/checkpoint.safetensors --limit 100 --out runs/lipschitz

Constants are of the logits, over the l_inf ball of the first checkpoint, by linear bounds; every upper bound has an
attained value beside it. OUT gets histogram.png, over_eps.png, and the rows of each network in a folder of its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robust import lipschitz_plots, plots
from robust.checkpoint import load
from robust.dataset import parse_dataset
from robust.files import read_json_lines
from robust.lipschitz import ROWS_FILE, Plan, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--eps", type=float, help="radius (default: the first checkpoint's)")
    parser.add_argument("--states", default="crown", help="bounds before the activations")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    constants: dict[str, list[float]] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    radii: list[float] = []
    ball: Any = None
    for text in options.networks:
        name, _, path = text.partition("=")
        checkpoint = load(Path(path))
        ball = ball or (checkpoint.ball if options.eps is None else type(checkpoint.ball)(options.eps))
        data = parse_dataset(checkpoint.settings["data"])(options.root)
        plan = Plan(options=(("states", options.states),))
        source = {"checkpoint": path, "data": data.name, "split": "test"}
        summary = measure(
            checkpoint.model, data.test, ball, plan, options.out / name, source=source, classes=data.classes,
            limit=options.limit,
        )  # fmt: skip
        rows = read_json_lines(options.out / name / ROWS_FILE)[1:]
        constants |= {
            f"{name}, upper bound": [r["constant"] for r in rows],
            f"{name}, attained": [r["attained"] for r in rows],
        }
        radii, curves[name] = (
            summary["over_eps"]["eps"],
            (summary["over_eps"]["constant"], summary["over_eps"]["attained"]),
        )
        for side in ("constant", "attained"):
            facts = ", ".join(f"{word} {value:.4g}" for word, value in summary[side].items())
            print(f"{name:>12} {side:>9} at eps {float(ball.eps):g}: {facts}")
        right = sum(r["label"] == r["prediction"] for r in rows)
        print(f"{name:>12} {right} of {len(rows)} right, {summary['seconds'] / len(rows):.2f} s per image", flush=True)
    plots.save(lipschitz_plots.constants_histogram(constants), options.out / "histogram.png")
    plots.save(lipschitz_plots.constants_over_eps(radii, curves), options.out / "over_eps.png")


if __name__ == "__main__":
    main()
