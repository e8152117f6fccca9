"""BRO: block reflectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_linear, mapped_ring


@LIPSCHITZ_LAYERS.register("bro")
@dataclass(frozen=True)
class BRO:
    """I - 2 V (V* V)^-1 V*, V with n / divisor columns; a convolution frequency by frequency on a ring.

    Orthogonal but for the ridge of 1e-5 of V* V's mean diagonal before the solve, which errs on the side below 1. V is
    the first columns of the stored square matrix. The paper pads the image with zeros around the ring and crops it
    again; here the ring is the image. Source: Lai et al. 2025.

    Args:
        divisor: 2 in the paper, 8 on Tiny-ImageNet.
    """

    divisor: int = 2

    orthogonal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.divisor < 1:
            raise ValueError(f"bro: expected divisor >= 1, got {self.divisor}")

    def dense(self, features: int) -> nn.Module:
        return mapped_linear(self.reflected, features, features)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        return mapped_ring(self.reflected, channels, kernel, size)

    def reflected(self, weight: Tensor) -> Tensor:
        """Block reflectors of matrices `[..., n, n]`."""
        columns = weight[..., : max(1, weight.shape[-1] // self.divisor)]
        gram = columns.mH @ columns
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        ridge = 1e-5 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        whole = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        return whole - 2 * columns @ torch.linalg.solve(gram + ridge * identity, columns.mH)
