"""CNN7: the standard network of certified training (Shi et al. 2021 and everyone after), and its deeper kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Conv, Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("cnn7")
@dataclass(frozen=True)
class CNN7:
    """Five 3x3 convolutions (w, w, 2w with stride 2, 2w, 2w), FC, logits; batch norm before every ReLU.

    Variants by field:
        hidden_batch_norm=false: none on the FC layer (Shi's first variant).
        batch_norm=false: none at all, which is Gowal et al.'s "large" network.
        width=32,hidden=216 and width=96: SABR's narrow and wide networks.
        last_stride: stride of the fifth convolution; 0 chooses 2 for images of 64 pixels and more, else 1.
            On 56x56 TinyImageNet crops SABR has 1 and TAPS has 2.
    """

    width: int = 64
    hidden: int = 512
    batch_norm: bool = True
    hidden_batch_norm: bool = True
    last_stride: int = 0

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = _convolutions(self.width, 5, self.last_stride or _last_stride(input_shape))
        dense = [Dense(self.hidden)]
        norm, norm_dense = self.batch_norm, self.batch_norm and self.hidden_batch_norm
        return feed_forward(
            "cnn7", convs, dense, input_shape, classes, mean, std, batch_norm=norm, dense_batch_norm=norm_dense
        )


@MODELS.register("cnn9")
@dataclass(frozen=True)
class CNN9:
    """CNN7 with two more 3x3 convolutions at the end (Mao et al. 2024)."""

    width: int = 64
    hidden: int = 512
    batch_norm: bool = True

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        return _deep("cnn9", 7, self, input_shape, classes, mean, std)


@MODELS.register("cnn11")
@dataclass(frozen=True)
class CNN11:
    """CNN7 with four more 3x3 convolutions at the end (Mao et al. 2024)."""

    width: int = 64
    hidden: int = 512
    batch_norm: bool = True

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        return _deep("cnn11", 9, self, input_shape, classes, mean, std)


@MODELS.register("cnn13")
@dataclass(frozen=True)
class CNN13:
    """CNN7 with six more 3x3 convolutions at the end (Mao et al. 2024)."""

    width: int = 64
    hidden: int = 512
    batch_norm: bool = True

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        return _deep("cnn13", 11, self, input_shape, classes, mean, std)


def _convolutions(width: int, count: int, last_stride: int) -> list[Conv]:
    """w, w, 2w with stride 2, then 2w throughout."""
    wide = [Conv(2 * width, 3, 1, 1)] * (count - 4)
    return [Conv(width, 3, 1, 1)] * 2 + [Conv(2 * width, 3, 2, 1)] + wide + [Conv(2 * width, 3, last_stride, 1)]


def _last_stride(input_shape: Shape) -> int:
    """2 for images of 64 pixels and more, so that the hidden layer stays the size it has on CIFAR-10."""
    return 2 if min(input_shape[1:]) >= 64 else 1


def _deep(
    name: str,
    convolutions: int,
    model: CNN9 | CNN11 | CNN13,
    input_shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Sequential:
    convs = _convolutions(model.width, convolutions, _last_stride(input_shape))
    dense = [Dense(model.hidden)]
    return feed_forward(name, convs, dense, input_shape, classes, mean, std, batch_norm=model.batch_norm)
