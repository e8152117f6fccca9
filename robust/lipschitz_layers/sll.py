"""SLL: SDP-based Lipschitz layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.lipschitz_layer import LIPSCHITZ_LAYERS


@LIPSCHITZ_LAYERS.register("sll")
@dataclass(frozen=True)
class SLL:
    """x - 2 W T^-1 relu(W^T x + b), T_i = sum over j of |W^T W|_ij q_j / q_i with q > 0 learned.

    A nonlinear residual layer, with M = W T^(-1/2) and a bias in other units: x - 2 M relu(M^T x + b), of norm at most
    1 as M is; so `certify` sees it, and measures M. Source: Araujo et al. 2023.

    Args:
        least: added to the divisor T; the published runs became nan with less than 1e-6.
    """

    least: float = 1e-6

    orthogonal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.least <= 0:
            raise ValueError(f"sll: expected least > 0, got {self.least}")

    def dense(self, features: int) -> nn.Module:
        return PotentialStep(torch.Size((features, features)), self.least)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        if kernel % 2 == 0:
            raise ValueError(f"sll: the transposed convolution needs an odd kernel, got {kernel}")
        return PotentialStep(torch.Size((channels, channels, kernel, kernel)), self.least)


class PotentialStep(nn.Module):
    """x - 2 M relu(M^T x + b); `weight` is W^T, `[hidden, in]` or a kernel `[hidden, in, k, k]` with zero padding."""

    def __init__(self, shape: torch.Size, least: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape).normal_())
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        self.log_q = nn.Parameter(torch.zeros(shape[0]))
        self.least, self.padding = least, shape[-1] // 2 if len(shape) == 4 else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner()
        if self.padding is None:
            return x - F.linear(torch.relu(F.linear(x, inner, self.bias)), 2 * inner.t())
        outer = 2 * inner.flip(2, 3).transpose(0, 1)
        hidden = torch.relu(F.conv2d(x, inner, self.bias, padding=self.padding))
        return x - F.conv2d(hidden, outer, padding=self.padding)

    def plain(self) -> nn.Module:
        """The step with M computed once."""
        inner, bias = self.inner().detach(), self.bias.detach().clone()
        down: nn.Linear | nn.Conv2d
        up: nn.Linear | nn.Conv2d
        hidden, features = inner.shape[:2]
        if self.padding is None:
            outer = inner.t()
            down, up = nn.Linear(features, hidden), nn.Linear(hidden, features, bias=False)
        else:
            kernel, outer = inner.shape[2], inner.flip(2, 3).transpose(0, 1)
            down = nn.Conv2d(features, hidden, kernel, padding=self.padding)
            up = nn.Conv2d(hidden, features, kernel, padding=self.padding, bias=False)
        down.weight, down.bias, up.weight = nn.Parameter(inner), nn.Parameter(bias), nn.Parameter(2 * outer)
        return _Step(nn.Sequential(down, nn.ReLU(), up))

    def inner(self) -> Tensor:
        """M^T."""
        if self.padding is None:
            products = (self.weight @ self.weight.t()).abs()
            return self.weight * self._inverse_root(products).view(-1, 1)
        # Entry (i, j) sums over all shifts: the kernel correlated with itself, on the infinite plane.
        products = F.conv2d(self.weight, self.weight, padding=2 * self.padding).abs().sum((2, 3))
        return self.weight * self._inverse_root(products).view(-1, 1, 1, 1)

    def _inverse_root(self, products: Tensor) -> Tensor:
        """T^(-1/2) for |W^T W|."""
        q = self.log_q.exp()
        return (products @ q / q + self.least).rsqrt()

    @torch.no_grad()
    def start_(self, generator: torch.Generator) -> None:
        """Normal weights; their scale cancels."""
        noise = torch.randn(self.weight.shape, generator=generator, device=generator.device)
        self.weight.copy_(noise / self.weight[0].numel() ** 0.5)


class _Step(nn.Module):
    """x minus a branch of it."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x - self.branch(x)
