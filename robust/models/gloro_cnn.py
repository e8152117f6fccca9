"""Convolutional networks of GloRo (Leino et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robust.l2_net import Activation, L2Layers, L2Net
from robust.layers import Conv, Shape
from robust.model import MODELS


@MODELS.register("gloro_cnn")
@dataclass(frozen=True)
class GloRoCNN:
    """3x3 convolutions with padding 1, FC layers, logits; the default is CIFAR-10's 6C2F.

    Args:
        channels, strides: of the convolutions, one number each.
        hidden: features of the FC layers.
        activation: after every layer but the last.
        unit_rows: rows of the last layer of norm 1.
    """

    channels: tuple[int, ...] = (32, 32, 32, 64, 64, 64)
    strides: tuple[int, ...] = (1, 1, 2, 1, 1, 2)
    hidden: tuple[int, ...] = (512,)
    activation: Activation = "minmax"
    unit_rows: bool = False

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.strides):
            raise ValueError(f"gloro_cnn: {len(self.channels)} channels need as many strides, got {len(self.strides)}")

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> L2Net:
        net = L2Layers("gloro_cnn", input_shape, mean, std)
        for channels, stride in zip(self.channels, self.strides, strict=True):
            net.conv(Conv(channels, 3, stride, 1))
            net.activate(self.activation)
        net.flatten()
        for features in self.hidden:
            net.dense(features)
            net.activate(self.activation)
        return net.network(classes, self.unit_rows)
