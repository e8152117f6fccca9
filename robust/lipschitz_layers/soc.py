"""SOC: skew orthogonal convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from certify.op import RULES, Call, Op
from certify.ops.exponential import Exponential
from robust.l2_net import stored_weight
from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_linear


@LIPSCHITZ_LAYERS.register("soc")
@dataclass(frozen=True)
class SOC:
    """The exponential of a skew-symmetric convolution, by its power series; a dense layer by the matrix exponential.

    Orthogonal up to the terms left out, whose size a certificate adds. The convolution is scaled down to a norm of at
    most 1 by a bound of ours, so that few terms are enough. Source: Singla & Feizi 2021.

    Args:
        train_terms, terms: of the series in training and in evaluation.
    """

    train_terms: int = 5
    terms: int = 12

    orthogonal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.train_terms, self.terms) < 1:
            raise ValueError(f"soc: the series needs at least one term, got {self}")

    def dense(self, features: int) -> nn.Module:
        return mapped_linear(_exponential, features, features)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        return SkewConv(channels, kernel, size, self.train_terms, self.terms)


def _exponential(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(weight - weight.mT)


class SkewConv(nn.Module):
    """exp(S) x + bias, S the zero-padded convolution with `weight`, which a parametrization makes skew-symmetric."""

    def __init__(self, channels: int, kernel: int, size: tuple[int, int], train_terms: int, terms: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"soc: a skew-symmetric convolution needs an odd kernel, got {kernel}")
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel, kernel).normal_())
        self.bias = nn.Parameter(torch.zeros(channels))
        self.in_shape, self.train_terms, self.terms = (channels, *size), train_terms, terms
        parametrize.register_parametrization(self, "weight", _Skew())

    def forward(self, x: Tensor) -> Tensor:
        return self.op().forward(x)

    def plain(self) -> nn.Module:
        """The terms of the series as convolutions."""
        weight = self.weight.detach()
        kernel = weight.shape[2]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], kernel, padding=kernel // 2, bias=False)
        conv.weight = nn.Parameter(weight.clone())
        return _Series(conv, self.bias.detach().clone().view(-1, 1, 1), self.terms)

    def op(self) -> Exponential:
        """The layer with the terms of its mode."""
        return Exponential(self.weight, self.bias, self.train_terms if self.training else self.terms, self.in_shape)

    @torch.no_grad()
    def start_(self, generator: torch.Generator) -> None:
        """Normal weights of standard deviation 1 / fan_in: the layer is close to the identity."""
        stored = stored_weight(self)
        noise = torch.randn(stored.shape, generator=generator, device=generator.device)
        stored.copy_(noise / stored[0].numel())


class _Series(nn.Module):
    """The power series of a convolution's exponential, and a shift."""

    bias: Tensor

    def __init__(self, convolution: nn.Conv2d, bias: Tensor, terms: int) -> None:
        super().__init__()
        self.convolution, self.terms = convolution, terms
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        total = power = x
        for k in range(1, self.terms + 1):
            power = self.convolution(power) / k
            total = total + power
        return total + self.bias


class _Skew(nn.Module):
    def forward(self, kernel: Tensor) -> Tensor:
        skew = kernel - kernel.flip(2, 3).transpose(0, 1)
        # A convolution's norm is at most that of its kernel as a matrix [out, in * k * k] times the root of its taps.
        bound = torch.linalg.matrix_norm(skew.flatten(1), 2) * (kernel.shape[2] * kernel.shape[3]) ** 0.5
        return skew / bound.clamp(min=1)


@RULES.module(SkewConv)
def _skew_conv(layer: SkewConv, call: Call) -> Op:
    return layer.op()
