"""The cascade against the stored results of alpha-beta-CROWN: images decided and CPU seconds, on one core.

Usage: python scripts/bench/verify_golden.py [NETWORK ...] [--timeout 20] [--verifier cascade] [--out rows.jsonl]

The reference folder is $ROBUST_REFERENCE, or shared/reference beside the checkout. A network is loaded once; every
image is certified by itself, and its time is the CPU time (user and system) of the process, capture included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from attacks.threat import LinfBall
from certify.verifier import VERIFIERS
from robust.allocator import keep_freed_memory
from tests.golden.networks import NAMES, load

OURS = {"certified": "verified", "falsified": "falsified", "unknown": "unknown", "misclassified": "misclassified"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NAMES, metavar="NETWORK", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds per image")
    parser.add_argument("--verifier", default="cascade", help="text of a verifier with a field timeout")
    parser.add_argument("--out", type=Path, help="file for one JSON line per image")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    joint = "," if ":" in arguments.verifier else ":"
    verifier = VERIFIERS.parse(f"{arguments.verifier}{joint}timeout={arguments.timeout}")
    rows = [row for name in arguments.networks for row in compare(name, verifier)]
    summary(rows)
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(name: str, verifier: object) -> list[dict[str, object]]:
    golden = load(name)
    rows = []
    for i, sample in enumerate(golden.samples):
        stored = sample.get("alpha_beta_crown_init_crown") or sample["alpha_beta_crown"]
        x, y, ball = golden.x[i : i + 1], golden.y[i : i + 1], LinfBall(float(golden.eps[i]))
        begin, wall = time.process_time(), time.perf_counter()
        (verdict,) = verifier(golden.model, x, y, ball)  # type: ignore[operator]
        seconds, waited = time.process_time() - begin, time.perf_counter() - wall
        ours = OURS[verdict.status]
        rows.append(
            {
                "network": name,
                "image": i,
                "ours": ours,
                "theirs": stored["verdict"],
                "seconds": round(seconds, 3),
                "wall": round(waited, 3),
                "their_seconds": round(stored["time"], 3),
                "method": verdict.method,
                "margin_lb": verdict.margin_lb,
                "domains": verdict.domains,
            }
        )
        clash = {ours, stored["verdict"]} == {"verified", "falsified"}
        print(
            f"{name:22s} {i:3d}  {ours:10s} {seconds:7.2f} s  {verdict.method:20s} {verdict.domains:7d} domains"
            f"   stored {stored['verdict']:10s} {stored['time']:6.2f} s{'   CONTRADICTION' if clash else ''}",
            flush=True,
        )
    return rows


def summary(rows: list[dict[str, object]]) -> None:
    print(f"\n{'network':22s} images  decided: ours  stored   seconds where both decided: ours  stored   ratio")
    names = list(dict.fromkeys(row["network"] for row in rows))
    for name in [*names, "all"]:
        some = [row for row in rows if name in ("all", row["network"])]
        both = [row for row in some if "unknown" not in (row["ours"], row["theirs"])]
        ours, theirs = (sum(float(row[key]) for row in both) for key in ("seconds", "their_seconds"))  # type: ignore[arg-type]
        counts = [sum(row[key] != "unknown" for row in some) for key in ("ours", "theirs")]
        print(
            f"{name:22s} {len(some):6d} {counts[0]:14d} {counts[1]:7d} {ours:34.1f} {theirs:7.1f} {ours / theirs:7.2f}"
        )


if __name__ == "__main__":
    main()
