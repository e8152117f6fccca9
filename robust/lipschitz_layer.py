"""Registry of layers that are 1-Lipschitz in l2 by construction, and what several of them share.

"By construction" holds in exact arithmetic; training relies on it. Certificates do not: `certify` captures the
effective weights and bounds their norms itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attacks.registry import Registry
from certify.op import RULES, Call, Op
from certify.ops import circular_conv
from robust.l2_net import stored_weight

LIPSCHITZ_LAYERS = Registry("1-Lipschitz layer", "robust.lipschitz_layers")


class LipschitzLayer(Protocol):
    """Frozen dataclass of hyper-parameters that makes layers with as many outputs as inputs.

    Class facts:
        orthogonal: every singular value of a dense layer is 1, not only at most 1.
    """

    orthogonal: ClassVar[bool]

    def dense(self, features: int) -> nn.Module:
        """A layer of vectors `[B, features]`."""
        ...

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        """A layer of images `[B, channels, *size]`, stride 1; `kernel` is odd."""
        ...


MatrixMap = Callable[[Tensor], Tensor]
"""Differentiable map of matrices `[..., m, n]`, real or complex, to ones of norm at most 1 and the same shape."""


class Mapped(nn.Module):
    """Parametrization of the weight of a dense layer, or of a convolution with stride = kernel.

    The latter cuts its image into patches that do not overlap, and is a matrix as well.
    """

    def __init__(self, function: MatrixMap) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: Tensor) -> Tensor:
        return self.function(weight.flatten(1)).view_as(weight)


class MappedSpectrum(nn.Module):
    """Parametrization of a kernel `[out, in, k, k]`: one of the image's size, whose matrix at each frequency is mapped.

    The kernel is centred: its middle tap is at place (0, 0) of the ring.
    """

    def __init__(self, function: MatrixMap, size: tuple[int, int]) -> None:
        super().__init__()
        self.function, self.size = function, size

    def forward(self, kernel: Tensor) -> Tensor:
        height, width = self.size
        padded = F.pad(kernel, (0, width - kernel.shape[3], 0, height - kernel.shape[2]))
        centred = padded.roll((-(kernel.shape[2] // 2), -(kernel.shape[3] // 2)), (2, 3))
        matrices = self.function(torch.fft.rfft2(centred).permute(2, 3, 0, 1))
        return torch.fft.irfft2(matrices.permute(2, 3, 0, 1), s=self.size)


def mapped_linear(function: MatrixMap, inputs: int, outputs: int) -> nn.Linear:
    """Dense layer with the effective weight `function(W)`."""
    layer = nn.Linear(inputs, outputs)
    parametrize.register_parametrization(layer, "weight", Mapped(function))
    return layer


def mapped_patches(function: MatrixMap, channels: int, outputs: int, side: int) -> nn.Conv2d:
    """Convolution over patches of side x side pixels that do not overlap, its weight mapped as one matrix."""
    layer = nn.Conv2d(channels, outputs, side, side)
    parametrize.register_parametrization(layer, "weight", Mapped(function))
    return layer


def mapped_ring(function: MatrixMap, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
    """Circular convolution whose matrix at every frequency is mapped."""
    return CircularConv2d(channels, kernel, size, MappedSpectrum(function, size))


class CircularConv2d(nn.Module):
    """Convolution on a ring of the image's size; see `certify.ops.circular_conv`.

    Args:
        spectrum: parametrization that makes the kernel `[C, C, H, W]` from the trained one `[C, C, kernel, kernel]`.
    """

    def __init__(self, channels: int, kernel: int, size: tuple[int, int], spectrum: nn.Module) -> None:
        super().__init__()
        if kernel > min(size):
            raise ValueError(f"a kernel of {kernel} does not fit a ring of {size[0]}x{size[1]}; use a smaller one")
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel, kernel).normal_())
        self.bias = nn.Parameter(torch.zeros(channels))
        parametrize.register_parametrization(self, "weight", spectrum, unsafe=True)

    @torch.no_grad()
    def start_(self, generator: torch.Generator) -> None:
        """Orthogonal weights, as of a dense layer."""
        nn.init.orthogonal_(stored_weight(self), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return circular_conv.CircularConv2d(self.weight, self.bias).forward(x)

    def plain(self) -> nn.Module:
        """The image laid out again on two of its sides, and a convolution without padding over it."""
        weight = self.weight.flip(2, 3)
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]))
        conv.weight, conv.bias = nn.Parameter(weight.clone()), nn.Parameter(self.bias.clone())
        return nn.Sequential(_Wrap(), conv)


class _Wrap(nn.Module):
    """Images `[B, C, H, W]` on the ring, each pixel from 1 to 2 H - 1 and 1 to 2 W - 1."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, 1:], x], 2)
        return torch.cat([x[:, :, :, 1:], x], 3)


@RULES.module(CircularConv2d)
def _circular(layer: CircularConv2d, call: Call) -> Op:
    return circular_conv.CircularConv2d(layer.weight, layer.bias)
