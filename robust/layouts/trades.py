"""Checkpoints of TRADES and the many repositories that took over its networks (MART, AWP's TRADES part, DAFA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robust.layout import LAYOUTS
from robust.residual_names import post_activation, wide


@LAYOUTS.register("trades")
@dataclass(frozen=True)
class TRADES:
    """`resnet18` (conv1, bn1, layer1 to layer4, linear) and `wide_resnet` (conv1, block1 to block3, bn1, fc), fed with
    pixels in [0, 1]. WRN-34-10's `sub_block1`, which no pass uses, is left out.

    Source: yaodongyu/TRADES, `models/resnet.py` and `models/wideresnet.py`.
    """

    normalizes: ClassVar[bool] = False

    def names(self, tensors: Mapping[str, Tensor], model: nn.Sequential) -> dict[str, str] | None:
        used = [name for name in tensors if not name.startswith("sub_block1.")]
        return post_activation(used, model) or wide(used, model)
