"""CNN5: three convolutions and a hidden layer (Mao et al. 2024, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Conv, Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("cnn5")
@dataclass(frozen=True)
class CNN5:
    """conv 3x3 s1, conv 4x4 s2, conv 4x4 s2, FC, logits; batch norm, where wanted, before every ReLU."""

    width: int = 16
    hidden: int = 512
    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(self.width, 3, 1, 1), Conv(self.width, 4, 2, 1), Conv(2 * self.width, 4, 2, 1)]
        dense = [Dense(self.hidden)]
        return feed_forward("cnn5", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)
