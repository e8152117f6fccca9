"""Networks with stored Lipschitz bounds, as torch modules in float64."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.threat import LinfBall
from tests.golden.networks import reference_folder

FOLDER = reference_folder() / "golden_lipschitz"
LAYERS = {"relu": nn.ReLU, "flatten": nn.Flatten, "tanh": nn.Tanh}


class NotIncluded(Exception):
    """Weights that are public but not part of the stored values; the message says where they are looked for."""


@dataclass(frozen=True)
class Stored:
    """A network, its centres `[N, *shape]`, and all arrays that are stored with it."""

    model: nn.Sequential
    centers: Tensor
    arrays: dict[str, np.ndarray]


@lru_cache
def values() -> dict[str, Any]:
    """Layers, instances and bounds by the network's name; empty where there are none."""
    return json.loads((FOLDER / "values.json").read_text()) if FOLDER.exists() else {}


@lru_cache
def network(name: str) -> Stored:
    """A network in float64.

    Raises:
        NotIncluded: its weights are not part of the values, and not in $ROBUST_PUBLIC_WEIGHTS.
    """
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    layers = values()[name]["layers"]
    keys = [layer[key] for layer in layers for key in ("weight", "bias") if key in layer]
    if not all(key in arrays for key in keys):
        arrays |= dict(zip(keys, _public(name), strict=True))
    model = nn.Sequential(*(_layer(layer, arrays) for layer in layers))
    return Stored(model, torch.from_numpy(arrays["centers"]).double().view(-1, *values()[name]["shape"]), arrays)


def instance(name: str, key: str) -> tuple[nn.Sequential, Tensor, LinfBall, dict[str, Any]]:
    """(network, centre `[1, *shape]`, ball, stored bounds)."""
    stored, entry = network(name), values()[name]["instances"][key]
    return stored.model, stored.centers[entry["center"]].unsqueeze(0), LinfBall(entry["eps"], None), entry


def _layer(layer: dict[str, Any], arrays: dict[str, np.ndarray]) -> nn.Module:
    if layer["type"] in LAYERS:
        return LAYERS[layer["type"]]()
    weight, bias = (torch.from_numpy(arrays[layer[key]]).double() for key in ("weight", "bias"))
    if layer["type"] == "linear":
        module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        kernel = (int(weight.shape[2]), int(weight.shape[3]))
        module = nn.Conv2d(weight.shape[1], weight.shape[0], kernel, layer["stride"], layer["padding"])
    module.double().load_state_dict({"weight": weight, "bias": bias})
    return module


def _public(name: str) -> list[np.ndarray]:
    """Weights and biases in the order of the layers."""
    path = Path(os.environ.get("ROBUST_PUBLIC_WEIGHTS", FOLDER)) / f"{name}.pth"
    if not path.exists():
        raise NotIncluded(f"the weights of {name} are public but not included: no {path} (see $ROBUST_PUBLIC_WEIGHTS)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != values()[name]["weights_file_sha256"]:
        raise ValueError(f"{path} is not the file that the values were made with: its sha256 is {digest}")
    return [value.numpy() for value in torch.load(path, weights_only=True, map_location="cpu").values()]
