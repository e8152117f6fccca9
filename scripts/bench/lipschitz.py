"""Local Lipschitz constants: values and CPU seconds of our methods beside the stored ones.

    ROBUST_PUBLIC_WEIGHTS=FOLDER python scripts/bench/lipschitz.py [--only cifar_2c2f] [--share 0.5]

Values and networks lie in golden_lipschitz in $ROBUST_REFERENCE, or in shared/reference beside the checkout; the public
weights that are not included (cifar_2c2f.pth, mnist_fc_3layer.pth of auto_LiRPA's examples/vision/pretrained) in
$ROBUST_PUBLIC_WEIGHTS. Seconds are CPU seconds of the process for all outputs, on one thread, after one call that warms
up. Branch and bound is given `--share` of those that the stored one used. A row says by how much our bounds exceed the
exact ones, and the stored ones, at most over the outputs, and how far the upper bounds are above attained values.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from attacks.threat import LinfBall
from certify.lipschitz.local import LipschitzBound, local_lipschitz
from certify.lipschitz.search import Search
from tests.golden.lipschitz_networks import NotIncluded, instance, values

REFERENCE_SECONDS = {"mlp_16": "0.09-0.16", "mlp_4layer": "0.09-0.16", "cnn_8x8": "0.09-0.16", "cifar_2c2f": "30"}
"""auto_LiRPA's linear bounds of all outputs, float32, as measured when the values were made; 3 s per output for the
last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="one network")
    parser.add_argument("--share", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread, float64")
    heads = ("open", "method", "seconds", "stored", "over exact", "over stored", "ub / lb - 1")
    print("{:16} {:>4} {:6} {:>8} {:>10} {:>11} {:>12} {}".format("instance", *heads))
    for name in values():
        if options.only in (None, name):
            _network(name, options.share)


def _network(name: str, share: float) -> None:
    for key in values()[name]["instances"]:
        try:
            model, x, ball, entry = instance(name, key)
        except NotIncluded as error:
            print(error)
            return
        opened = sum(entry.get("unstable_per_layer_crown") or [])
        local_lipschitz(model, x, ball, search=Search(samples=0))
        seconds, found = _timed(model, x, ball, "crown", search=Search(samples=0))
        line = _facts(found, entry, torch.tensor(entry["linear_bounds"], dtype=torch.float64))
        print(f"{name + ' ' + key:16} {opened:4d} crown  {seconds:8.3f} {REFERENCE_SECONDS.get(name, ''):>10} {line}")
        if "bab" in entry:
            theirs = torch.tensor(entry["bab"]["value"], dtype=torch.float64)
            limit = entry["bab"]["cpu_s"]
            seconds, found = _timed(model, x, ball, "bab", limit=share * limit)
            line = _facts(found, entry, theirs)
            print(f"{name + ' ' + key:16} {opened:4d} bab    {seconds:8.3f} {limit:10.2f} {line}", flush=True)


def _timed(
    model: nn.Module, x: Tensor, ball: LinfBall, method: str, limit: float | None = None, **options: Any
) -> tuple[float, LipschitzBound]:
    begin = time.process_time()
    if limit is None:
        found = local_lipschitz(model, x, ball, method, **options)
        return time.process_time() - begin, found
    try:
        # By CPU time, as the stored search was: a busy machine must not decide.
        latest: list[tuple[Tensor, Tensor]] = []

        def on_bound(ub: Tensor, lb: Tensor) -> None:
            latest[:] = [(ub.clone(), lb.clone())]
            if time.process_time() - begin > limit:
                raise TimeoutError

        found = local_lipschitz(model, x, ball, method, timeout=3600.0, on_bound=on_bound, **options)
    except TimeoutError:
        found = LipschitzBound(*latest[0], 0.0)
    return time.process_time() - begin, found


def _facts(found: LipschitzBound, entry: dict[str, Any], theirs: Tensor) -> str:
    ub = found.ub[0]
    exact = (
        ""
        if entry["exact"] is None
        else f"{float((ub / torch.tensor(entry['exact'], dtype=torch.float64) - 1).max()):11.1e}"
    )
    gap = float((ub / found.lb[0] - 1).max()) if bool((found.lb > 0).all()) else float("nan")
    return f"{exact:>11} {float((ub / theirs - 1).max()):12.1e} {gap:.1e}"


if __name__ == "__main__":
    main()
