"""ReLU and LeakyReLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.interval import Interval
from certify.op import RULES, Activation, Box, Call, Lines, Op


@dataclass(frozen=True)
class ReLU(Activation):
    """max(v, 0), or max(v, negative_slope * v) for a leaky one (0 <= negative_slope < 1)."""

    negative_slope: float = 0.0

    free = 1

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.negative_slope == 0.0:
            return F.relu(inputs[0])
        return F.leaky_relu(inputs[0], self.negative_slope)

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        if self.negative_slope == 0.0:
            return Interval(*_ReLUInterval.apply(box.center, box.radius))
        return super().interval(box)

    def loose(self, box: Box) -> Tensor:
        return (box.lb < 0) & (box.ub > 0)

    def default_alpha(self, box: Box) -> Tensor:
        """Zhang et al. 2018's adaptive choice: the lower line that leaves the smaller area, slope 1 where u > -l."""
        return (box.ub > -box.lb).to(box.lb.dtype).unsqueeze(0)

    def lines(self, box: Box, alpha: Tensor | None = None) -> Lines:
        lb, ub = box
        a = self.negative_slope
        unstable = self.loose(box)
        chosen = self.default_alpha(box)[0] if alpha is None else alpha[0]
        chosen = chosen * (1 - a) + a if a else chosen
        # where() differentiates both branches: unguarded, the untaken 0/0 would send nan into the weights.
        # Clamping ub - lb instead would flatten the chord below the function at ub: unsound.
        width = torch.where(unstable, ub - lb, 1.0)
        chord = (ub - a * lb) / width
        # A box that is not a number (overflow) must not pass for an inactive neuron: nan makes every bound nan.
        stable = torch.where(lb >= 0, torch.ones_like(lb), torch.where(ub <= 0, torch.full_like(lb, a), torch.nan))
        upper = torch.where(unstable, chord, stable)
        intercept = torch.where(unstable, (a - chord) * lb, 0.0)
        return Lines(torch.where(unstable, chosen, stable), None, upper, intercept)

    def backward(
        self, A: Tensor, boxes: Sequence[Box | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        box = boxes[0]
        assert box is not None
        lines = self.lines(box, alpha)
        assert lines.upper_intercept is not None
        negative = A.clamp(max=0)
        constant = torch.einsum("rbn,bn->rb", negative.flatten(2), lines.upper_intercept.flatten(1))
        # A- * upper + A+ * lower, with one product less: A * lower + A- * (upper - lower).
        return [torch.addcmul(A * lines.lower_slope, negative, lines.upper_slope - lines.lower_slope)], constant


class _ReLUInterval(torch.autograd.Function):
    """ReLU of a box given by centre and radius.

    The backward pass reads the signs of both ends from the outputs, which the next layer keeps anyway: the box before
    the ReLU need not be stored. lb > 0 before exactly where lb > 0 after, likewise ub.
    """

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        ub = torch.add(center, radius).relu_()
        lb = torch.sub(center, radius).relu_()
        center = torch.lerp(lb, ub, 0.5)
        radius = torch.sub(center, lb, out=lb)
        ctx.save_for_backward(center, radius)
        return center, radius

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_center, grad_radius = grads
        center, radius = ctx.saved_tensors
        passes = torch.ops.aten.threshold_backward  # grad where its second argument is positive, else 0
        upper = passes(grad_center + grad_radius, center + radius, 0)
        lower = passes(grad_center - grad_radius, center - radius, 0)
        grad_center = torch.lerp(lower, upper, 0.5)
        return grad_center, torch.sub(grad_center, lower, out=lower)


@RULES.module(nn.ReLU)
def _relu(layer: nn.ReLU, call: Call) -> Op:
    return ReLU()


@RULES.module(nn.LeakyReLU)
def _leaky_relu(layer: nn.LeakyReLU, call: Call) -> Op:
    return _leaky(layer.negative_slope)


@RULES.function(torch.relu, F.relu, "relu", "relu_", torch.relu_, F.relu_)
def _relu_call(call: Call) -> Op:
    return ReLU()


@RULES.function(F.leaky_relu)
def _leaky_relu_call(call: Call) -> Op:
    return _leaky(call.argument(1, "negative_slope", 0.01))


def _leaky(slope: float) -> Op:
    if not 0 <= slope < 1:
        raise ValueError(f"LeakyReLU(negative_slope={slope}): bounds need 0 <= negative_slope < 1")
    return ReLU(slope)
