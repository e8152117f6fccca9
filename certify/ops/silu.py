"""SiLU (swish): v sigmoid(v), which falls to its minimum near -1.28 and rises from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.interval import Interval
from certify.op import RULES, Activation, AnyBox, Call, Lines, Op
from certify.ops.gate import Gate

LOWEST_AT = -1.2784645
LOWEST = -0.2784646
"""Rounded down from -0.27846454. |silu(v) - relu(v)| is largest at LOWEST_AT and -LOWEST_AT, where it is the same."""

LARGEST_CURVATURE = 0.5
"""Of |silu''|, at 0."""

STEEPEST_AT = 2.3993573
STEEPEST, FLATTEST = 1.0998394, -0.0998394
"""silu' rises between -STEEPEST_AT and STEEPEST_AT and falls elsewhere; its ends there, rounded outward."""


@dataclass(frozen=True)
class SiLU(Activation):
    """v sigmoid(v).

    Lines on [l, u] with centre c and half-width r: the tangent at c, moved by the largest remainder r^2 / 4, or, where
    that is wider, lines around ReLU, which is above SiLU by at most 0.2785. Not monotone: it has its own interval rule.
    """

    free: ClassVar[int] = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.silu(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        at_lb, at_ub = self.forward(box.lb), self.forward(box.ub)
        turns = (box.lb <= LOWEST_AT) & (box.ub >= LOWEST_AT)
        # It falls and then rises, so it is largest at an end, and least at an end where it does not turn.
        lowest = torch.where(turns, LOWEST, torch.minimum(at_lb, at_ub))
        return Interval.from_box(lowest, torch.maximum(at_lb, at_ub))

    def derivative(self, x: Tensor) -> Tensor:
        """silu'(x)."""
        gate = torch.sigmoid(x)
        return gate * (1 + x * (1 - gate))

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        (box,) = boxes
        assert box is not None
        at_lb, at_ub = self.derivative(box.lb), self.derivative(box.ub)
        low, high = torch.minimum(at_lb, at_ub), torch.maximum(at_lb, at_ub)
        low = torch.where((box.lb <= -STEEPEST_AT) & (box.ub >= -STEEPEST_AT), FLATTEST, low)
        high = torch.where((box.lb <= STEEPEST_AT) & (box.ub >= STEEPEST_AT), STEEPEST, high)
        return [Gate(low, high)]

    def lipschitz(self, norm: str) -> float:
        return STEEPEST

    def lines(self, box: AnyBox, alpha: Tensor | None = None) -> Lines:
        lb, ub = box.lb, box.ub
        center, radius = (lb + ub) / 2, (ub - lb) / 2
        tangent = self.derivative(center)
        start = self.forward(center) - tangent * center
        remainder = LARGEST_CURVATURE / 2 * radius.square()
        rising = (ub > -lb).to(lb.dtype)
        wide = ub > lb
        chord = torch.where(wide, (ub.relu() - lb.relu()) / torch.where(wide, ub - lb, 1.0), 0.0)
        around = remainder > -LOWEST
        lower_slope, upper_slope = torch.where(around, rising, tangent), torch.where(around, chord, tangent)
        lower = torch.where(around, LOWEST, start - remainder)
        upper = torch.where(around, lb.relu() - chord * lb, start + remainder)
        rounding = 8 * torch.finfo(lb.dtype).eps * (1 + 2 * torch.maximum(lb.abs(), ub.abs()))
        return Lines(lower_slope, lower - rounding, upper_slope, upper + rounding)


@RULES.module(nn.SiLU)
def _silu(layer: nn.SiLU, call: Call) -> Op:
    return SiLU()


@RULES.function(F.silu)
def _silu_call(call: Call) -> Op:
    return SiLU()
