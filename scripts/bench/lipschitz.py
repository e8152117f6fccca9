"""Local Lipschitz constants: values and CPU seconds of our methods beside the stored ones.

    python scripts/bench/lipschitz.py [FOLDER] [--only mlp_16] [--share 0.5]

FOLDER holds values.json and one npz per network, as its README describes; by default golden_lipschitz in
$ROBUST_REFERENCE, or in shared/reference beside the checkout. Branch and bound is given `--share` of the CPU seconds
that the stored one used, on one thread; a row says by how much our bounds exceed the exact ones, and the stored ones,
at most over the outputs. Seconds are the process's own, after one call that warms up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.threat import LinfBall
from certify.lipschitz.local import LipschitzBound, local_lipschitz
from certify.lipschitz.search import Search

LAYERS = {"relu": nn.ReLU, "tanh": nn.Tanh, "flatten": nn.Flatten}
REFERENCE_SECONDS = {"mlp_16": "0.09-0.16", "mlp_4layer": "0.09-0.16", "cnn_8x8": "0.09-0.16"}
"""auto_LiRPA's linear bounds of all outputs, float32, as measured when the values were made."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).resolve().parents[3] / "shared" / "reference"
    folder = Path(os.environ.get("ROBUST_REFERENCE", default)) / "golden_lipschitz"
    parser.add_argument("folder", type=Path, nargs="?", default=folder)
    parser.add_argument("--only", help="one network")
    parser.add_argument("--share", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    values = json.loads((options.folder / "values.json").read_text())
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread, float64")
    heads = ("open", "method", "seconds", "stored", "over exact", "over stored", "ub / lb - 1")
    print("{:16} {:>4} {:6} {:>8} {:>10} {:>11} {:>12} {}".format("instance", *heads))
    for name, net in values.items():
        if options.only in (None, name):
            _network(options.folder, name, net, options.share)


def _network(folder: Path, name: str, net: dict[str, Any], share: float) -> None:
    stored = dict(np.load(folder / f"{name}.npz"))
    if any(layer.get("weight", "l0.weight") not in stored for layer in net["layers"]):
        print(f"{name}: its weights are not included")
        return
    model = _model(net, stored)
    for key, entry in net["instances"].items():
        x = torch.from_numpy(stored["centers"][entry["center"]]).double().view(1, *net["shape"])
        ball = LinfBall(entry["eps"], None)
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


def _model(net: dict[str, Any], stored: dict[str, np.ndarray]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in net["layers"]:
        if layer["type"] in LAYERS:
            layers.append(LAYERS[layer["type"]]())
            continue
        weight, bias = (torch.from_numpy(stored[layer[key]]).double() for key in ("weight", "bias"))
        sizes = weight.shape[1], weight.shape[0]
        if layer["type"] == "linear":
            module: nn.Module = nn.Linear(*sizes, dtype=torch.float64)
        else:
            kernel = (int(weight.shape[2]), int(weight.shape[3]))
            module = nn.Conv2d(*sizes, kernel, layer["stride"], layer["padding"], dtype=torch.float64)
        module.load_state_dict({"weight": weight, "bias": bias})
        layers.append(module)
    return nn.Sequential(*layers)


if __name__ == "__main__":
    main()
