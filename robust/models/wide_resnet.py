"""Wide residual networks (Zagoruyko & Komodakis 2016): WRN-34-10 of TRADES is `wide_resnet:depth=34,widen=10`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robust.layers import Shape
from robust.model import MODELS
from robust.models.preact_resnet import preactivation_network


@MODELS.register("wide_resnet")
@dataclass(frozen=True)
class WideResNet:
    """Stem of 16 channels, then three stages of (depth - 4) / 6 pre-activation blocks.

    The stages have 16, 32 and 64 times `widen` channels and strides 1, 2, 2.

    No dropout, and without the unused extra stage that TRADES' file constructs.

    Raises:
        ValueError: depth is not 6n + 4.
    """

    depth: int = 34
    widen: int = 10

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"wide_resnet: depth must be 6n + 4 (10, 16, 22, 28, 34, ...), got {self.depth}")

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        blocks = (self.depth - 4) // 6
        stages = [(blocks, 16 * self.widen, 1), (blocks, 32 * self.widen, 2), (blocks, 64 * self.widen, 2)]
        return preactivation_network("wide_resnet", 16, stages, input_shape, classes, mean, std)
