"""BCOP: block convolution orthogonal parametrization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_linear


@LIPSCHITZ_LAYERS.register("bcop")
@dataclass(frozen=True)
class BCOP:
    """An orthogonal matrix, convolved with 2x1 and 1x2 kernels [P, I - P] of projections P of half the channels.

    Orthogonal on the infinite plane; the zero padding used here cuts it, which only lowers norms. Orthonormal bases by
    QR (the authors use Bjoerck's iteration). Source: Li et al. 2019.
    """

    orthogonal: ClassVar[bool] = True

    def dense(self, features: int) -> nn.Module:
        return mapped_linear(orthonormal, features, features)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        parametrize.register_parametrization(layer, "weight", _BlockConvolutions(channels, kernel))
        return layer


def orthonormal(weight: Tensor) -> Tensor:
    """Orthonormal columns that span those of matrices `[..., m, n]`, m >= n."""
    basis, upper = torch.linalg.qr(weight)
    # QR leaves signs open; with a positive diagonal an orthonormal matrix is its own basis.
    return basis * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


class _BlockConvolutions(nn.Module):
    """Makes a kernel `[C, C, k, k]` of projections and an orthogonal matrix, that of the stored kernel's middle tap."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.projections = nn.Parameter(torch.empty(2 * (kernel - 1), channels, max(1, channels // 2)).normal_())

    @torch.no_grad()
    def start_(self, kernel: Tensor, generator: torch.Generator) -> None:
        """Random projections."""
        shape = self.projections.shape
        self.projections.copy_(torch.randn(shape, generator=generator, device=generator.device))

    def forward(self, kernel: Tensor) -> Tensor:
        middle = kernel.shape[2] // 2
        out = orthonormal(kernel[:, :, middle, middle])[:, :, None, None]
        bases = orthonormal(self.projections)
        identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        for number, projection in enumerate(bases @ bases.mT):
            pair = torch.stack([projection, identity - projection], -1)
            out = _convolved(out, pair.unsqueeze(2 + number % 2))
        return out


def _convolved(first: Tensor, second: Tensor) -> Tensor:
    """Kernel of one convolution after another, `[C, C, *, *]` each."""
    reach = (second.shape[2] - 1, second.shape[3] - 1)
    # Rows of the first are images whose channels the second mixes.
    return F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=reach).transpose(0, 1)
