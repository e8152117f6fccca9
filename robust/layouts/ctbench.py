"""Checkpoints of CTBench, and of the code of SABR and TAPS that it goes back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robust.layout import LAYOUTS, in_order

NORMALIZATION = {"layers.0.mean": "0.mean", "layers.0.sigma": "0.std"}


@LAYOUTS.register("ctbench")
@dataclass(frozen=True)
class CTBench:
    """`layers.NUMBER.PART`; the normalisation is layer 0 (`mean`, `sigma`) and stored with the weights.

    Source: eth-sri/CTBench, `AIDomains/abstract_layers.py` (Sequential, Normalization) and `mix_train.py`. SABR's
    repository was not seen; that its files look the same is inferred.
    """

    normalizes: ClassVar[bool] = True

    def names(self, tensors: Mapping[str, Tensor], model: nn.Sequential) -> dict[str, str] | None:
        if not set(NORMALIZATION) <= set(tensors):
            return None
        rest = {name: tensor for name, tensor in tensors.items() if name not in NORMALIZATION}
        found = in_order(rest, model, "layers.")
        return None if found is None else {**NORMALIZATION, **found}
