"""Wide residual networks (Zagoruyko & Komodakis 2016): WRN-34-10 of TRADES is `wide_resnet:depth=34,widen=10`, the
"swish" WRN-28-10 of Gowal et al. 2020 `wide_resnet:depth=28,widen=10,activation=silu,bn_momentum=0.01`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from robust.layers import Shape
from robust.model import MODELS
from robust.models.preact_resnet import preactivation_network


@MODELS.register("wide_resnet")
@dataclass(frozen=True)
class WideResNet:
    """Stem of 16 channels, then three stages of (depth - 4) / 6 pre-activation blocks.

    The stages have 16, 32 and 64 times `widen` channels and strides 1, 2, 2.

    Args:
        activation: relu or silu (swish).
        bn_momentum: weight of the newest batch in BatchNorm's running statistics.

    No dropout, and without the unused extra stage that TRADES' file constructs.

    Raises:
        ValueError: depth is not 6n + 4.
    """

    depth: int = 34
    widen: int = 10
    activation: Literal["relu", "silu"] = "relu"
    bn_momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"wide_resnet: depth must be 6n + 4 (10, 16, 22, 28, 34, ...), got {self.depth}")

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        blocks = (self.depth - 4) // 6
        stages = [(blocks, 16 * self.widen, 1), (blocks, 32 * self.widen, 2), (blocks, 64 * self.widen, 2)]
        activation = {"relu": nn.ReLU, "silu": nn.SiLU}[self.activation]
        net = preactivation_network("wide_resnet", 16, stages, input_shape, classes, mean, std, activation)
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = self.bn_momentum
        return net
