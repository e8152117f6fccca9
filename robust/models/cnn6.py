"""CNN6: the smaller network of Shi et al. 2021."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Conv, Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("cnn6")
@dataclass(frozen=True)
class CNN6:
    """Four 3x3 convolutions (w, w, 2w with stride 2, 2w), FC, logits; batch norm before every ReLU."""

    width: int = 32
    hidden: int = 256
    batch_norm: bool = True

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        w = self.width
        convs = [Conv(w, 3, 1, 1), Conv(w, 3, 1, 1), Conv(2 * w, 3, 2, 1), Conv(2 * w, 3, 1, 1)]
        dense = [Dense(self.hidden)]
        return feed_forward("cnn6", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)
