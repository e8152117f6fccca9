"""Sigmoid and tanh: convex below 0, concave above, point-symmetric about their value at 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from certify.op import RULES, Activation, AnyBox, Call, Lines, Op
from certify.ops.gate import Gate

BISECTIONS = 40


@dataclass(frozen=True)
class SShaped(Activation):
    """An S-shaped function; `name` is "sigmoid" or "tanh".

    Lower line on [l, u]: a tangent in the convex part at d <= 0 whose value at u stays below s(u), or the chord where
    the function is concave on the box. Upper lines follow by point symmetry. The free parameters (one for the lower,
    one for the upper line) move the point of tangency. Source: Zhang et al. 2018, section 3.3.
    """

    name: str

    free: ClassVar[int] = 2

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.sigmoid(inputs[0]) if self.name == "sigmoid" else torch.tanh(inputs[0])

    def derivative(self, x: Tensor) -> Tensor:
        """s'(x)."""
        value = self.forward(x)
        return value * (1 - value) if self.name == "sigmoid" else 1 - value * value

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        """The derivative rises to its peak at 0 and falls after it."""
        (box,) = boxes
        assert box is not None
        far = torch.where(box.lb.abs() > box.ub.abs(), box.lb, box.ub)
        near = torch.zeros_like(far).clamp(box.lb, box.ub)
        return [Gate(self.derivative(far), self.derivative(near))]

    def lipschitz(self, norm: str) -> float:
        return 0.25 if self.name == "sigmoid" else 1.0

    def default_alpha(self, box: AnyBox) -> Tensor:
        return torch.stack([self._default(box.lb, box.ub), self._default(-box.ub, -box.lb)])

    def _default(self, lb: Tensor, ub: Tensor) -> Tensor:
        # In the middle of the box where the function is convex on it; touching the end point where it is not.
        return torch.where(ub <= 0, 0.5, 1.0).to(lb.dtype)

    def lines(self, box: AnyBox, alpha: Tensor | None = None) -> Lines:
        free = self.default_alpha(box) if alpha is None else alpha
        slope, intercept = self._lower(box.lb, box.ub, free[0])
        mirrored_slope, mirrored_intercept = self._lower(-box.ub, -box.lb, free[1])
        twice_middle = 1.0 if self.name == "sigmoid" else 0.0
        return Lines(slope, intercept, mirrored_slope, twice_middle - mirrored_intercept)

    def _lower(self, lb: Tensor, ub: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, intercept) of a line below the function on [lb, ub]; `position` in [0, 1] places its tangent."""
        width = ub - lb
        thin = width < 1e-4
        at_lb, at_ub = self.forward(lb), self.forward(ub)
        chord = (at_ub - at_lb) / torch.where(thin, 1.0, width)
        limit = self._tangent_limit(lb, ub)
        use_chord = limit <= lb
        point = lb + position * (torch.where(use_chord, lb, limit) - lb)
        tangent = self.derivative(point)
        slope = torch.where(use_chord, chord, tangent)
        intercept = torch.where(use_chord, at_lb - chord * lb, self.forward(point) - tangent * point)
        # Where 0/0 threatens, the constant s(lb) is a lower bound because s increases.
        slope = torch.where(thin, 0.0, slope)
        intercept = torch.where(thin, at_lb, intercept)
        unit = torch.finfo(lb.dtype).eps
        return slope, intercept - 4 * unit * (1 + (slope * torch.maximum(lb.abs(), ub.abs())).abs())

    def _tangent_limit(self, lb: Tensor, ub: Tensor) -> Tensor:
        """Greatest d <= min(0, ub) whose tangent is still below s(ub); at most lb if there is none in the box.

        Found by bisection that keeps the sound end: tangents at smaller points have smaller slopes and stay below.
        """
        with torch.no_grad():
            high = ub.clamp(max=0)
            low = lb.clamp(max=0)
            at_ub = self.forward(ub)
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = self.forward(middle) + self.derivative(middle) * (ub - middle) <= at_ub
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            return torch.where(ub <= 0, ub, low)


@RULES.module(nn.Sigmoid)
def _sigmoid(layer: nn.Sigmoid, call: Call) -> Op:
    return SShaped("sigmoid")


@RULES.module(nn.Tanh)
def _tanh(layer: nn.Tanh, call: Call) -> Op:
    return SShaped("tanh")


@RULES.function(torch.sigmoid, torch.nn.functional.sigmoid, "sigmoid", "sigmoid_")
def _sigmoid_call(call: Call) -> Op:
    return SShaped("sigmoid")


@RULES.function(torch.tanh, torch.nn.functional.tanh, "tanh", "tanh_")
def _tanh_call(call: Call) -> Op:
    return SShaped("tanh")
