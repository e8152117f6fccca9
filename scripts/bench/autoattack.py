"""AutoAttack beside its reference implementation: robust accuracy and time on the same model and images.

    pip install pyautoattack
    OMP_NUM_THREADS=1 python scripts/bench/autoattack.py CHECKPOINT ... [--images 500] [--root DATA]

For each checkpoint one JSON line: robust accuracies in percent, images on which the two disagree, points of ours that
leave the ball or the pixel range (counted in float64), and seconds of processor time, in all and attack by attack.
Both run in this process, one after the other, on one thread, the reference in its default batches of 250. Processor
time, because a machine with other work on it stretches the clock's.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack as Reference
from torch import Tensor, nn

import robust
from attacks.methods.autoattack import AutoAttack
from attacks.threat import Ball, make_ball

REFERENCE_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--norm", choices=sorted(REFERENCE_NORMS))
    parser.add_argument("--eps", type=float)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in options.checkpoints:
        checkpoint = robust.load(path)
        data = robust.parse_dataset(checkpoint.settings["data"])(options.root)
        x, y = data.test.batch(torch.arange(min(options.images, len(data.test))))
        norm = options.norm or checkpoint.ball.norm
        ball = make_ball(norm, float(checkpoint.ball.eps) if options.eps is None else options.eps)
        print(json.dumps({"model": checkpoint.settings["model"], **compare(checkpoint.model.eval(), x, y, ball)}))


def compare(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> dict[str, Any]:
    """Both runs on one model; see the head of this file."""
    points, seconds = run_ours(model, x, y, ball)
    reference_points, reference_seconds = run_reference(model, x, y, ball)
    with torch.no_grad():
        clean = model(x).argmax(1) == y
        ours, reference = model(points).argmax(1) == y, model(reference_points).argmax(1) == y
    return {
        "norm": ball.norm,
        "eps": ball.eps,
        "images": len(x),
        "clean": percent(clean),
        "robust": percent(ours),
        "robust_reference": percent(reference),
        "only_ours_fooled": int((reference & ~ours).sum()),
        "only_reference_fooled": int((ours & ~reference).sum()),
        "outside": int((~ball.contains(points, x)).sum()),
        "time_over_reference": round(sum(seconds.values()) / sum(reference_seconds.values()), 3),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_reference": {name: round(value, 1) for name, value in reference_seconds.items()},
    }


def run_ours(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> tuple[Tensor, dict[str, float]]:
    """Points, and seconds of each attack; each sees what those before it left."""
    points, seconds = x.clone(), {}
    with torch.no_grad():
        left = (model(x).argmax(1) == y).nonzero().squeeze(1)
    for name, attack in AutoAttack().stages(ball).items():
        started = time.process_time()
        points[left] = attack(model, x[left], y[left], ball, index=left)
        with torch.no_grad():
            left = left[model(points[left]).argmax(1) == y[left]]
        seconds[name] = time.process_time() - started
    return points, seconds


def run_reference(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> tuple[Tensor, dict[str, float]]:
    reference = Reference(model, norm=REFERENCE_NORMS[ball.norm], eps=float(ball.eps), seed=0, version="standard")
    clock = _Clock()
    reference.logger = reference.apgd.logger = reference.apgd_targeted.logger = clock.logger
    points, _ = reference.run_standard_evaluation(x, y)
    return points, clock.seconds()


class _Clock(logging.Handler):
    """Notes when the reference says that it starts an attack, which is all that it tells about its progress."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.starts: list[tuple[str, float]] = []
        self.logger = logging.Logger("reference", logging.DEBUG)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        first, _, rest = record.getMessage().partition(" ")
        if first == "running":
            self.starts.append((rest.replace("-", "_"), time.process_time()))

    def seconds(self) -> dict[str, float]:
        ends = [start for _, start in self.starts[1:]] + [time.process_time()]
        return {name: end - start for (name, start), end in zip(self.starts, ends, strict=True)}


def percent(flags: Tensor) -> float:
    return round(100 * flags.double().mean().item(), 2)


if __name__ == "__main__":
    main()
