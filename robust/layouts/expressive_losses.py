"""Checkpoints of the expressive losses' code, and of Shi et al.'s fast IBP that it goes back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robust.layout import LAYOUTS, in_order


@LAYOUTS.register("expressive_losses")
@dataclass(frozen=True)
class ExpressiveLosses:
    """`NUMBER.PART` from 0, in a file {"state_dict", "epoch", ...}; images are normalised by the data loader.

    Source: alessandrodepalma/expressive-losses, `models/feedforward.py` and `utils.py`.
    """

    normalizes: ClassVar[bool] = True

    def names(self, tensors: Mapping[str, Tensor], model: nn.Sequential) -> dict[str, str] | None:
        return in_order(tensors, model) if "0.weight" in tensors else None
