"""Checkpoints of CTRAIN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robust.layout import LAYOUTS, in_order


@LAYOUTS.register("ctrain")
@dataclass(frozen=True)
class CTRAIN:
    """`layers.NUMBER.PART` from 0, in a file {"model_state_dict", ...} or alone; the data loader normalises.

    Source: ADA-research/CTRAIN, `model_definitions/models_shi.py` and `model_wrappers/model_wrapper.py`.
    """

    normalizes: ClassVar[bool] = True

    def names(self, tensors: Mapping[str, Tensor], model: nn.Sequential) -> dict[str, str] | None:
        return in_order(tensors, model, "layers.") if "layers.0.weight" in tensors else None
