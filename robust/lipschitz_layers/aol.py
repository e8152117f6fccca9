"""AOL: almost orthogonal Lipschitz layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_linear


@LIPSCHITZ_LAYERS.register("aol")
@dataclass(frozen=True)
class AOL:
    """W diag(t) with t_i = (sum over j of |W^T W|_ij)^(-1/2); for a convolution the kernel correlated with itself.

    At most 1 by Gershgorin's circles, without iteration. Source: Prach & Lampert 2022.
    """

    orthogonal: ClassVar[bool] = False

    def dense(self, features: int) -> nn.Module:
        return mapped_linear(rescaled, features, features)

    def conv(self, channels: int, kernel: int, size: tuple[int, int]) -> nn.Module:
        layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        parametrize.register_parametrization(layer, "weight", _RescaledKernel())
        return layer


def rescaled(weight: Tensor) -> Tensor:
    """W diag(t) of matrices `[..., m, n]`."""
    return weight * _inverse_root((weight.mT @ weight).abs().sum(-1)).unsqueeze(-2)


class _RescaledKernel(nn.Module):
    def forward(self, kernel: Tensor) -> Tensor:
        return kernel * _inverse_root(correlation_sums(kernel)).view(1, -1, 1, 1)


def correlation_sums(kernel: Tensor) -> Tensor:
    """For each input channel i of a kernel `[out, in, k, k]`, the sum of |W^T W| over a row i: `[in]`.

    W is the convolution on the infinite plane, of which the zero-padded one is a part.
    """
    taps = kernel.transpose(0, 1)  # [in, out, k, k]
    reach = (kernel.shape[2] - 1, kernel.shape[3] - 1)
    return F.conv2d(taps, taps, padding=reach).abs().sum((1, 2, 3))


def _inverse_root(sums: Tensor) -> Tensor:
    # An input that no output reads has the sum 0 and stays unread.
    return sums.clamp(min=torch.finfo(sums.dtype).tiny).rsqrt()
