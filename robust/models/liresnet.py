"""LiResNet: residual blocks whose nonlinearity stands behind the sum (Hu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robust.l2_net import L2Layers, L2Net
from robust.layers import Conv, Shape
from robust.model import MODELS


@MODELS.register("liresnet")
@dataclass(frozen=True)
class LiResNet:
    """Stem, linear residual convolutions with MinMax, 4x4 neck, FC, logits with unit rows; "L12W256" and its kin.

    Stem: 5x5 with stride 2 for images up to 32 pixels, 7x7 with stride 4 up to 64, patches of round(sqrt(width / 3))
    pixels above: 16x16 places in all three. Starting weights of stem, neck and FC are orthogonal (ours; the paper's
    are not known to us).

    Args:
        depth, width: residual convolutions and their channels.
        hidden: features of the FC layer: 512, on ImageNet 2048.
        stem_kernel, stem_stride: another stem; 0 for the rule above.
    """

    depth: int = 12
    width: int = 256
    hidden: int = 512
    stem_kernel: int = 0
    stem_stride: int = 0

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> L2Net:
        net = L2Layers("liresnet", input_shape, mean, std)
        net.conv(self._stem(max(input_shape[1:])))
        net.activate()
        for _ in range(self.depth):
            net.residual_conv(3, self.depth**-0.5)
            net.activate()
        net.conv(Conv(2 * self.width, 4, 4))
        net.activate()
        net.flatten()
        net.dense(self.hidden)
        net.activate()
        return net.network(classes)

    def _stem(self, side: int) -> Conv:
        patch = round((self.width / 3) ** 0.5)
        kernel, stride = (5, 2) if side <= 32 else (7, 4) if side <= 64 else (patch, patch)
        kernel, stride = self.stem_kernel or kernel, self.stem_stride or stride
        return Conv(self.width, kernel, stride, kernel // 2 if stride < kernel else 0)
