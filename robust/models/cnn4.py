"""CNN4: CNN3 with a hidden fully connected layer (Mao et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Conv, Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("cnn4")
@dataclass(frozen=True)
class CNN4:
    """conv 5x5 s2, conv 4x4 s2, FC, logits."""

    width: int = 16
    hidden: int = 512
    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(self.width, 5, 2, 2), Conv(2 * self.width, 4, 2, 1)]
        dense = [Dense(self.hidden)]
        return feed_forward("cnn4", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)
