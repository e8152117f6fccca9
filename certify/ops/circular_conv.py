"""Convolution on a ring, with a kernel as large as the image: what orthogonal layers make in the frequency domain."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.op import AffineOp


@dataclass(frozen=True)
class CircularConv2d(AffineOp):
    """`y[o, p] = sum over i, q of weight[o, i, p - q] x[i, q] + bias[o]`, differences of places modulo H and W.

    `weight` is `[out, in, H, W]`. In the frequency domain it is one small matrix per frequency.
    """

    weight: Tensor
    bias: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        out = _filtered(torch.fft.rfft2(self.weight), inputs[0])
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)

    def absolute(self, radius: Tensor) -> Tensor:
        # Rounding in the transforms may leave what is 0 below it.
        return self.absolute_part().forward(radius).clamp(min=0)

    def linear_part(self) -> AffineOp:
        return replace(self, bias=None)

    def absolute_part(self) -> AffineOp:
        return replace(self, weight=self.weight.abs(), bias=None)

    def transpose(self, A: Tensor) -> Tensor:
        adjoint = torch.fft.rfft2(self.weight).conj().transpose(0, 1)
        return _filtered(adjoint, A.flatten(0, 1)).unflatten(0, A.shape[:2])

    def constant(self, A: Tensor) -> Tensor:
        return A.new_zeros(A.shape[:2]) if self.bias is None else A.flatten(3).sum(-1) @ self.bias

    def symbols(self) -> Tensor:
        """The matrix `[out, in]` of each frequency, one of every conjugate pair: `[frequencies, out, in]`."""
        return torch.fft.rfft2(self.weight).flatten(2).permute(2, 0, 1)


def _filtered(spectrum: Tensor, x: Tensor) -> Tensor:
    """Images `[B, in, H, W]` through the matrices of each frequency `[out, in, H, W // 2 + 1]`."""
    return torch.fft.irfft2(torch.einsum("oihw,bihw->bohw", spectrum, torch.fft.rfft2(x)), s=x.shape[-2:])
