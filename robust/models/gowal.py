"""The networks of Gowal et al. 2018, in four sizes; none has batch norm in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from robust.layers import Conv, Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("gowal_tiny")
@dataclass(frozen=True)
class GowalTiny:
    """One hidden layer of 100."""

    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        return feed_forward("gowal_tiny", [], [Dense(100)], input_shape, classes, mean, std, batch_norm=self.batch_norm)


@MODELS.register("gowal_small")
@dataclass(frozen=True)
class GowalSmall:
    """conv 4x4 16 s2, conv 4x4 32 s1, FC 100, logits, no padding."""

    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(16, 4, 2), Conv(32, 4, 1)]
        dense = [Dense(100)]
        return feed_forward("gowal_small", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)


@MODELS.register("gowal_medium")
@dataclass(frozen=True)
class GowalMedium:
    """conv 3x3 32 s1, 4x4 32 s2, 3x3 64 s1, 4x4 64 s2, FC 512, FC 512, logits, no padding."""

    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        convs = [Conv(32, 3, 1), Conv(32, 4, 2), Conv(64, 3, 1), Conv(64, 4, 2)]
        dense = [Dense(512)] * 2
        return feed_forward("gowal_medium", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)


@MODELS.register("gowal_large")
@dataclass(frozen=True)
class GowalLarge:
    """3x3 convolutions 64, 64, 128 s2, 128, 128, then FC 512 and logits.

    `padding="same"` is the paper's network up to one detail: its framework pads a strided convolution at the bottom
    and the right only, this one symmetrically. `padding="valid"` is CTRAIN's network of the same name.
    """

    padding: Literal["same", "valid"] = "same"
    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        pad = 1 if self.padding == "same" else 0
        convs = [Conv(64, 3, 1, pad)] * 2 + [Conv(128, 3, 2, pad)] + [Conv(128, 3, 1, pad)] * 2
        dense = [Dense(512)]
        return feed_forward("gowal_large", convs, dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)
