"""Cayley layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_linear, mapped_ring


@LIPSCHITZ_LAYERS.register("cayley")
@dataclass(frozen=True)
class Cayley:
    """(I - A)(I + A)^-1 of the skew-Hermitian A = V - V*; a convolution frequency by frequency on a ring.

    Orthogonal. Source: Trockman & Kolter 2021.
    """

    orthogonal: ClassVar[bool] = True

    def dense(self, features: int) -> nn.Module:
        return mapped_linear(cayley, features, features)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        return mapped_ring(cayley, channels, kernel, size)


def cayley(weight: Tensor) -> Tensor:
    """Cayley transform of square matrices `[..., n, n]`."""
    skew = weight - weight.mH
    identity = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    # Both factors are functions of A and commute.
    return torch.linalg.solve(identity + skew, identity - skew)
