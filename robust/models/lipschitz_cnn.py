"""Convolutional network of layers that are 1-Lipschitz by construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attacks.registry import method_field
from robust.l2_net import L2Layers, L2Net
from robust.layers import Shape
from robust.lipschitz_layer import LIPSCHITZ_LAYERS, LipschitzLayer, mapped_linear, mapped_patches
from robust.lipschitz_layers.cayley import Cayley
from robust.lipschitz_layers.cholesky import cholesky
from robust.model import MODELS


@MODELS.register("lipschitz_cnn")
@dataclass(frozen=True)
class LipschitzCNN:
    """Stages of convolutions of one kind with MinMax, each behind a 2x2 patch layer; FC layers, logits with unit rows.

    Stage s has 2^s times the width, on a quarter of the pixels of the one before. What changes shape (patches, the
    first FC layer) is made orthogonal by Cholesky's factorisation; `layer` does the rest. The design is ours.

    Args:
        layer: the 1-Lipschitz layer.
        width: channels of the first stage.
        stages, blocks: number of stages, and of convolutions in each.
        kernel: of the convolutions.
        hidden, dense: features and number of FC layers.
    """

    layer: LipschitzLayer = method_field(LIPSCHITZ_LAYERS, Cayley())
    width: int = 32
    stages: int = 3
    blocks: int = 2
    kernel: int = 3
    hidden: int = 256
    dense: int = 2

    def __post_init__(self) -> None:
        if min(self.width, self.stages, self.hidden) < 1 or min(self.blocks, self.dense - 1) < 0 or not self.kernel % 2:
            raise ValueError(f"lipschitz_cnn: expected positive sizes and an odd kernel, got {self}")

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> L2Net:
        net = L2Layers("lipschitz_cnn", input_shape, mean, std)
        for stage in range(self.stages):
            channels, height, width = net.shape
            out = self.width * 2**stage
            size = (height // 2, width // 2)
            if min(size) < self.kernel:
                raise ValueError(
                    f"lipschitz_cnn: stage {stage + 1} of {self.stages} would see {size[0]}x{size[1]} pixels, fewer "
                    f"than its kernel of {self.kernel}; use fewer stages"
                )
            net.add(mapped_patches(cholesky, channels, out, 2), (out, *size))
            for _ in range(self.blocks):
                net.activate()
                net.add(self.layer.conv(out, self.kernel, size), net.shape)
            net.activate()
        net.flatten()
        net.add(mapped_linear(cholesky, net.shape[0], self.hidden), (self.hidden,))
        for _ in range(self.dense - 1):
            net.activate()
            net.add(self.layer.dense(self.hidden), net.shape)
        net.activate()
        return net.network(classes)
