"""ConvMed and ConvMedBig, the small benchmark networks of the ERAN verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Conv, Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("conv_med")
@dataclass(frozen=True)
class ConvMed:
    """conv 5x5 32 s2, conv 4x4 128 s2, FC 250, logits."""

    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(32, 5, 2, 2), Conv(128, 4, 2, 1)]
        dense = [Dense(250)]
        return feed_forward("conv_med", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)


@MODELS.register("conv_med_big")
@dataclass(frozen=True)
class ConvMedBig:
    """conv 3x3 32 s1, conv 4x4 32 s2, conv 4x4 128 s2, FC 250, logits."""

    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(32, 3, 1, 1), Conv(32, 4, 2, 1), Conv(128, 4, 2, 1)]
        dense = [Dense(250)]
        return feed_forward("conv_med_big", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)
