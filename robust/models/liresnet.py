"""LiResNet: residual blocks whose nonlinearity stands behind the sum (Hu et al. 2023, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from attacks.registry import method_field
from robust.l2_net import L2Layers, L2Net, Residual
from robust.layers import Conv, Shape
from robust.lipschitz_layer import LIPSCHITZ_LAYERS, LipschitzLayer, Mapped, mapped_linear, mapped_patches
from robust.lipschitz_layers.cholesky import cholesky
from robust.model import MODELS


@MODELS.register("liresnet")
@dataclass(frozen=True)
class LiResNet:
    """Stem, linear residual convolutions with MinMax, 4x4 neck, FC, logits with unit rows; "L12W256" and its kin.

    Stem: 5x5 with stride 2 for images up to 32 pixels, 7x7 with stride 4 up to 64, patches of round(sqrt(width / 3))
    pixels above: 16x16 places in all three. Starting weights of stem, neck and FC are orthogonal (ours; the paper's
    are not known to us). Without the centering of 2024, which does not change constants.

    Args:
        depth, width: residual convolutions and their channels.
        hidden: features of the FC layers: 512, on ImageNet and in 2024 2048.
        residual_dense: residual FC layers behind the first, made orthogonal: 8 in 2024. With them the neck goes from
            patches to `width` channels, and neck and first FC layer are orthogonal, too, by Cholesky's factorisation.
        layer: a 1-Lipschitz layer in place of the residual convolutions; `bro` makes a BRONet of it (Lai et al. 2025).
        stem_kernel, stem_stride: another stem; 0 for the rule above.
    """

    depth: int = 12
    width: int = 256
    hidden: int = 512
    residual_dense: int = 0
    layer: LipschitzLayer | None = method_field(LIPSCHITZ_LAYERS, None)
    stem_kernel: int = 0
    stem_stride: int = 0

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> L2Net:
        net = L2Layers("liresnet", input_shape, mean, std)
        net.conv(self._stem(max(input_shape[1:])))
        net.activate()
        for _ in range(self.depth):
            if self.layer is None:
                net.residual_conv(3, self.depth**-0.5)
            else:
                net.add(self.layer.conv(self.width, 3, (net.shape[1], net.shape[2])), net.shape)
            net.activate()
        if self.residual_dense:
            self._orthogonal_end(net)
        else:
            net.conv(Conv(2 * self.width, 4, 4))
            net.activate()
            net.flatten()
            net.dense(self.hidden)
            net.activate()
        return net.network(classes)

    def _orthogonal_end(self, net: L2Layers) -> None:
        channels, height, width = net.shape
        net.add(mapped_patches(cholesky, channels, self.width, 4), (self.width, height // 4, width // 4))
        net.flatten()
        net.add(mapped_linear(cholesky, net.shape[0], self.hidden), (self.hidden,))
        net.activate()
        for _ in range(self.residual_dense):
            layer = nn.Linear(self.hidden, self.hidden)
            parametrize.register_parametrization(layer, "weight", Residual(layer.weight, self.residual_dense**-0.5))
            parametrize.register_parametrization(layer, "weight", Mapped(cholesky))
            net.add(layer, net.shape)
            net.activate()

    def _stem(self, side: int) -> Conv:
        patch = round((self.width / 3) ** 0.5)
        kernel, stride = (5, 2) if side <= 32 else (7, 4) if side <= 64 else (patch, patch)
        kernel, stride = self.stem_kernel or kernel, self.stem_stride or stride
        return Conv(self.width, kernel, stride, kernel // 2 if stride < kernel else 0)
