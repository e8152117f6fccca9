"""The small networks of the CROWN-IBP repository (Zhang et al. 2020); none has batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Conv, Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("crown_ibp_2layer")
@dataclass(frozen=True)
class CrownIBP2Layer:
    """conv 4x4 4w s2, conv 4x4 8w s2, FC, logits; the paper's have width 1 or 2 and 128 to 512 hidden units."""

    width: int = 1
    hidden: int = 128

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(4 * self.width, 4, 2, 1), Conv(8 * self.width, 4, 2, 1)]
        return feed_forward("crown_ibp_2layer", convs, [Dense(self.hidden)], input_shape, classes, mean, std)


@MODELS.register("crown_ibp_3layer_fixed")
@dataclass(frozen=True)
class CrownIBP3LayerFixed:
    """Two kxk convolutions (4w, 8w; padding 1), conv 4x4 8w s4 without padding, FC, logits.

    `hidden=0` means 64 hidden units per unit of width.
    """

    width: int = 1
    kernel: int = 3
    hidden: int = 0

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        w = self.width
        convs = [Conv(4 * w, self.kernel, 1, 1), Conv(8 * w, self.kernel, 1, 1), Conv(8 * w, 4, 4, 0)]
        dense = [Dense(self.hidden or 64 * w)]
        return feed_forward("crown_ibp_3layer_fixed", convs, dense, input_shape, classes, mean, std)


@MODELS.register("crown_ibp_4layer")
@dataclass(frozen=True)
class CrownIBP4Layer:
    """conv 3x3 4w s1, 4x4 4w s2, 3x3 8w s1, 4x4 8w s2, FC, FC, logits."""

    width: int = 1
    hidden: int = 256

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        w = self.width
        convs = [Conv(4 * w, 3, 1, 1), Conv(4 * w, 4, 2, 1), Conv(8 * w, 3, 1, 1), Conv(8 * w, 4, 2, 1)]
        dense = [Dense(self.hidden)] * 2
        return feed_forward("crown_ibp_4layer", convs, dense, input_shape, classes, mean, std)
