"""L1 penalty on weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from certify.ops.affine import Conv2d, Linear
from robust.regularizer import REGULARIZERS
from robust.views import Views


@REGULARIZERS.register("l1")
@dataclass(frozen=True)
class L1:
    """weight * sum |W| over convolutional and dense weights; no biases, no BatchNorm (CTBench's and EXPR's scope)."""

    weight: float = 1e-5

    needs_boxes: ClassVar[bool] = False

    def __call__(self, views: Views) -> dict[str, Tensor]:
        ops = [step.build() for step in views.graph.steps[1:]]
        total = [op.weight.abs().sum() for op in ops if isinstance(op, Conv2d | Linear)]
        return {"l1": self.weight * torch.stack(total).sum()}
