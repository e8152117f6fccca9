"""Published networks with reference bounds, as torch modules."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("cnn_a_adv", "resnet2b", "cifar_conv_small_pgd", "mnist_6_100_nat")


def reference_folder() -> Path:
    """Folder of reference material: $ROBUST_REFERENCE, or shared/reference beside the checkout."""
    default = Path(__file__).resolve().parents[3] / "shared" / "reference"
    return Path(os.environ.get("ROBUST_REFERENCE", default))


class LayerList(nn.Module):
    """A network given as a topologically ordered list of layers."""

    def __init__(self, description: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.layers = description["layers"]
        for statistic in ("mean", "std"):
            value = torch.tensor(description["normalisation"][statistic], dtype=torch.float32)
            self.register_buffer(statistic, value.view(-1, 1, 1))
        for name, array in weights.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.from_numpy(array)))

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": (x - self.mean) / self.std}
        for layer in self.layers:
            inputs = [values[name] for name in layer["inputs"]]
            values[layer["name"]] = getattr(self, layer["op"])(layer, *inputs)
        return values[self.layers[-1]["name"]]

    def conv2d(self, layer: dict[str, Any], x: Tensor) -> Tensor:
        return F.conv2d(x, *self.tensors(layer), stride=layer["stride"], padding=layer["padding"])

    def linear(self, layer: dict[str, Any], x: Tensor) -> Tensor:
        return F.linear(x, *self.tensors(layer))

    def relu(self, layer: dict[str, Any], x: Tensor) -> Tensor:
        return F.relu(x)

    def flatten(self, layer: dict[str, Any], x: Tensor) -> Tensor:
        return x.flatten(1)

    def add(self, layer: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def tensors(self, layer: dict[str, Any]) -> tuple[Tensor, Tensor]:
        weight, bias = (getattr(self, layer[key].replace(".", "_")) for key in ("weight", "bias"))
        return weight, bias


@dataclass(frozen=True)
class Golden:
    """One network, its images and the stored results."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: Tensor
    logits: Tensor
    samples: list[dict[str, Any]]

    def stored(self, method: str) -> tuple[Tensor, Tensor]:
        """(image numbers that have a value, stored lower bounds `[n, 9]`) of a bound method."""
        rows = [
            (i, s["lower_bounds"][method]) for i, s in enumerate(self.samples) if method in s.get("lower_bounds", {})
        ]
        return torch.tensor([i for i, _ in rows]), torch.tensor([values for _, values in rows])


def load(name: str) -> Golden:
    """The network `name` from the reference folder."""
    folder = reference_folder() / "golden" / name
    description = json.loads((folder / "network.json").read_text())
    inputs = np.load(folder / "inputs.npz")
    model = LayerList(description, dict(np.load(folder / "weights.npz"))).eval()
    results = json.loads((folder / "results.json").read_text())
    images = torch.from_numpy(inputs["images"]).float() / 255
    return Golden(
        model,
        images,
        torch.from_numpy(inputs["labels"]).long(),
        torch.from_numpy(inputs["eps"]),
        torch.from_numpy(inputs["logits"]),
        results["records"],
    )
