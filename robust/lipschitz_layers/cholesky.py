"""Cholesky-based orthogonal layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_linear, mapped_ring

RIDGE = 1e-3
"""Share of the mean diagonal that is added before the factorisation (Hu et al. 2024)."""


@LIPSCHITZ_LAYERS.register("cholesky")
@dataclass(frozen=True)
class Cholesky:
    """R^-1 V with R R* = V V* + e I: orthonormal rows up to e; a convolution frequency by frequency on a ring.

    The cheapest of the orthogonal dense layers. Norm at most 1, singular values sqrt(s^2 / (s^2 + e)) of V's s. The
    convolution is ours: the source has dense and patch layers. Source: Hu et al. 2024.
    """

    orthogonal: ClassVar[bool] = False

    def dense(self, features: int) -> nn.Module:
        return mapped_linear(cholesky, features, features)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        return mapped_ring(cholesky, channels, kernel, size)


def cholesky(weight: Tensor) -> Tensor:
    """Matrices `[..., m, n]` with nearly orthonormal rows (columns where m > n) from those given."""
    if weight.shape[-2] > weight.shape[-1]:
        return cholesky(weight.mH).mH
    gram = weight @ weight.mH
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram + ridge * identity), weight, upper=False)
