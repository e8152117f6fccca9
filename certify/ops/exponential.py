"""The exponential of a convolution, by its power series."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.op import AffineOp
from certify.ops.affine import Conv2d


@dataclass(frozen=True)
class Exponential(AffineOp):
    """`sum over k <= terms of S^k v / k! + bias`, S the zero-padded convolution with `weight` `[C, C, k, k]`, k odd.

    `in_shape` is (C, H, W) of one example. Where S is skew-symmetric its exponential is orthogonal, and the series is
    so up to the terms left out.
    """

    weight: Tensor
    bias: Tensor | None
    terms: int
    in_shape: tuple[int, ...]

    def forward(self, *inputs: Tensor) -> Tensor:
        total = power = inputs[0]
        for k in range(1, self.terms + 1):
            power = self.generator.forward(power) / k
            total = total + power
        return total if self.bias is None else total + self.bias.view(-1, 1, 1)

    def linear_part(self) -> AffineOp:
        return replace(self, bias=None)

    def absolute_part(self) -> AffineOp:
        # No less than the absolute values of the sum, which would take a dense matrix.
        return replace(self, weight=self.weight.abs(), bias=None)

    def transpose(self, A: Tensor) -> Tensor:
        backwards = replace(self, weight=self.adjoint, bias=None)
        return backwards.forward(A.flatten(0, 1)).unflatten(0, A.shape[:2])

    def constant(self, A: Tensor) -> Tensor:
        return A.new_zeros(A.shape[:2]) if self.bias is None else A.flatten(3).sum(-1) @ self.bias

    @property
    def generator(self) -> Conv2d:
        """S."""
        padding = (self.weight.shape[2] // 2, self.weight.shape[3] // 2)
        return Conv2d(self.weight, None, (1, 1), padding, (1, 1), 1, self.in_shape)

    @property
    def adjoint(self) -> Tensor:
        """Kernel of S^T."""
        return self.weight.flip(2, 3).transpose(0, 1)

    @property
    def is_skew(self) -> bool:
        """Whether S^T = -S, to the last bit."""
        return torch.equal(self.weight, -self.adjoint)
