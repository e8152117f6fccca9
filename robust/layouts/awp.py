"""Checkpoints of AWP's adversarial training, and of Rice et al.'s code that it goes back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robust.layout import LAYOUTS
from robust.residual_names import pre_activation, wide


@LAYOUTS.register("awp")
@dataclass(frozen=True)
class AWP:
    """`preactresnet18` (conv1, layer1 to layer4, bn, linear) and `wide_resnet` (without `sub_block1`), fed with images
    that the training script normalises. AWP's TRADES part has TRADES' layout and feeds pixels.

    Source: csdongxian/AWP, `AT_AWP/preactresnet.py`, `AT_AWP/wideresnet.py` and `AT_AWP/train_cifar10.py`.
    """

    normalizes: ClassVar[bool] = True

    def names(self, tensors: Mapping[str, Tensor], model: nn.Sequential) -> dict[str, str] | None:
        return pre_activation(list(tensors), model) or wide(list(tensors), model)
