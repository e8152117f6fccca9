"""Rows of an architecture table, and the plain `nn.Sequential` that a list of them describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.normalize import Normalize

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Conv:
    """Square convolution with bias."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if min(self.channels, self.kernel, self.stride) < 1 or self.padding < 0:
            raise ValueError(f"a convolution needs positive sizes, got {self}")

    def output_size(self, size: int) -> int:
        """Height or width of the output for an input of `size` pixels; below 1 where the kernel does not fit."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Dense:
    """Hidden fully connected layer with bias."""

    features: int

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"a layer needs at least one unit, got {self}")


def normalization(name: str, input_shape: Shape, mean: Sequence[float], std: Sequence[float]) -> Normalize:
    """First layer of model `name`; ValueError unless mean and std have one value per channel."""
    if len(mean) != input_shape[0] or len(std) != input_shape[0]:
        raise ValueError(
            f"{name}: images have {input_shape[0]} channels, but mean has {len(mean)} values and std {len(std)}"
        )
    return Normalize(mean, std)


def feed_forward(
    name: str,
    convs: Sequence[Conv],
    dense: Sequence[Dense],
    input_shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    batch_norm: bool = False,
    dense_batch_norm: bool | None = None,
) -> nn.Sequential:
    """Normalize, convolutions, flatten, hidden layers, logits; a ReLU after all but the first and the last.

    Args:
        name: of the architecture, for messages.
        batch_norm: normalise between every convolution or hidden layer and its ReLU.
        dense_batch_norm: the same for hidden layers alone, where they differ; None follows `batch_norm`.

    Raises:
        ValueError: a convolution does not fit the image that reaches it.
    """
    layers: list[nn.Module] = [normalization(name, input_shape, mean, std)]
    channels, height, width = input_shape
    for number, conv in enumerate(convs, start=1):
        below = (height, width)
        height, width = conv.output_size(height), conv.output_size(width)
        if min(height, width) < 1:
            raise ValueError(
                f"{name} does not fit images of {input_shape[1]}x{input_shape[2]}: convolution {number} of "
                f"{len(convs)} ({conv.kernel}x{conv.kernel}, padding {conv.padding}) would see {below[0]}x{below[1]}"
            )
        layers.append(nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, conv.padding))
        layers += [nn.BatchNorm2d(conv.channels)] if batch_norm else []
        layers.append(nn.ReLU())
        channels = conv.channels
    layers.append(nn.Flatten())
    features = channels * height * width
    norm_dense = batch_norm if dense_batch_norm is None else dense_batch_norm
    for hidden in dense:
        layers.append(nn.Linear(features, hidden.features))
        layers += [nn.BatchNorm1d(hidden.features)] if norm_dense else []
        layers.append(nn.ReLU())
        features = hidden.features
    layers.append(nn.Linear(features, classes))
    return nn.Sequential(*layers)
