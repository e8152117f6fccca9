"""Batch normalisation in evaluation, with running statistics or with those of a given batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from certify.op import RULES, Call, Op
from certify.ops.affine import Conv2d, Scale


class Statistics(NamedTuple):
    """Mean and biased variance of a batch, each `[C]`."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class BatchNorm(Op):
    """A BatchNorm layer before its statistics are chosen; `resolve` gives the affine map."""

    layer: nn.modules.batchnorm._BatchNorm
    rank: int
    """Axes of one example: 1 for `[B, C]`, 2 for `[B, C, L]`, 3 for `[B, C, H, W]`."""

    is_linear = True

    def factors(self, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """(scale, shift) per channel, each `[C]`."""
        layer = self.layer
        mean, var = statistics or Statistics(layer.running_mean, layer.running_var)  # type: ignore[arg-type]
        scale = torch.rsqrt(var + layer.eps)
        if layer.weight is not None:
            scale = scale * layer.weight
        shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
        return scale, shift

    def resolve(self, statistics: Statistics | None = None) -> Scale:
        """The layer as elementwise scale and shift."""
        shape = (-1, *[1] * (self.rank - 1))
        scale, shift = self.factors(statistics)
        return Scale(scale.view(shape), shift.view(shape))

    def fold_into(self, conv: Conv2d, statistics: Statistics | None = None) -> Conv2d:
        """The convolution followed by this layer, as one convolution."""
        scale, shift = self.factors(statistics)
        bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
        return replace(conv, weight=conv.weight * scale.view(-1, 1, 1, 1), bias=bias)


@RULES.module(nn.BatchNorm1d)
def _batch_norm_1d(layer: nn.BatchNorm1d, call: Call) -> Op:
    return _checked(layer, len(call.args[0].shape))


@RULES.module(nn.BatchNorm2d)
def _batch_norm_2d(layer: nn.BatchNorm2d, call: Call) -> Op:
    return _checked(layer, 3)


def _checked(layer: nn.modules.batchnorm._BatchNorm, rank: int) -> BatchNorm:
    if layer.running_mean is None:
        raise ValueError("BatchNorm without running statistics has no fixed function; use track_running_stats=True")
    return BatchNorm(layer, rank)
