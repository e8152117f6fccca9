"""LOT: layer-wise orthogonal training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_linear, mapped_ring


@LIPSCHITZ_LAYERS.register("lot")
@dataclass(frozen=True)
class LOT:
    """(V V*)^(-1/2) V by Newton steps; a convolution frequency by frequency on a ring.

    Orthogonal up to what the steps leave, which is on the side below 1. Source: Xu, Li & Li 2022.

    Args:
        steps: coupled Newton-Schulz steps.
    """

    steps: int = 20

    orthogonal: ClassVar[bool] = True

    def dense(self, features: int) -> nn.Module:
        return mapped_linear(self.orthogonalized, features, features)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        return mapped_ring(self.orthogonalized, channels, kernel, size)

    def orthogonalized(self, weight: Tensor) -> Tensor:
        """Polar factor of matrices `[..., n, n]`."""
        identity = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        # Scaled so that all eigenvalues of the square lie in (0, 1], where the steps converge.
        size = torch.linalg.matrix_norm(weight).clamp(min=1e-12)[..., None, None]
        unit = weight / size
        root, inverse = unit @ unit.mH, identity
        for _ in range(self.steps):
            step = (3 * identity - inverse @ root) / 2
            root, inverse = root @ step, step @ inverse
        return inverse @ unit
