"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Dense, Shape, feed_forward
from robust.model import MODELS


@MODELS.register("mlp")
@dataclass(frozen=True)
class MLP:
    """Hidden layers of the given sizes, `mlp:hidden=100+100`, and the logits; an empty tuple is a linear classifier."""

    hidden: tuple[int, ...] = (100, 100)
    batch_norm: bool = False

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        dense = [Dense(features) for features in self.hidden]
        return feed_forward("mlp", [], dense, input_shape, classes, mean, std, batch_norm=self.batch_norm)
