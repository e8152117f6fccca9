"""CNN3: two strided convolutions and the logits (Mao et al. 2024, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Conv, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("cnn3")
@dataclass(frozen=True)
class CNN3:
    """conv 5x5 s2, conv 4x4 s2, logits.

    `width` is the first convolution's channel count: 16 in CTBench, 64 (with batch norm) in CTRAIN.
    """

    width: int = 16
    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(self.width, 5, 2, 2), Conv(2 * self.width, 4, 2, 1)]
        return feed_forward("cnn3", convs, [], input_shape, classes, mean, std, batch_norm=self.batch_norm)
