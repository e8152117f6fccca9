"""ReLU and LeakyReLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.blocks import blocks
from certify.interval import BoxesAndPoints, Interval
from certify.op import RULES, Activation, AnyBox, Call, Lines, Op
from certify.ops.gate import Gate


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

    def interval_and_points(self, *inputs: BoxesAndPoints) -> BoxesAndPoints:
        if self.negative_slope == 0.0:
            return BoxesAndPoints(*_ReLUInterval.apply(inputs[0].values, inputs[0].radius))
        return super().interval_and_points(*inputs)

    def loose(self, box: AnyBox) -> Tensor:
        return (box.lb < 0) & (box.ub > 0)

    def default_alpha(self, box: AnyBox) -> Tensor:
        """Zhang et al. 2018's adaptive choice: the lower line that leaves the smaller area, slope 1 where u > -l."""
        return (box.ub > -box.lb).to(box.lb.dtype).unsqueeze(0)

    def lines(self, box: AnyBox, alpha: Tensor | None = None) -> Lines:
        lb, ub = box.lb, box.ub
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
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        box = boxes[0]
        assert box is not None
        if isinstance(box, Interval) and alpha is None and self.negative_slope == 0.0:
            through, constant = _ReLUBackward.apply(A, box.center, box.radius)
            return [through], constant
        lines = self.lines(box, alpha)
        assert lines.upper_intercept is not None
        negative = A.clamp(max=0)
        constant = torch.einsum("rbn,bn->rb", negative.flatten(2), lines.upper_intercept.flatten(1))
        # A- * upper + A+ * lower, with one product less: A * lower + A- * (upper - lower).
        return [torch.addcmul(A * lines.lower_slope, negative, lines.upper_slope - lines.lower_slope)], constant

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        (box,) = boxes
        assert box is not None
        return [self.gate(box)]

    def gate(self, box: AnyBox) -> Gate:
        """The slopes at the points of a box."""
        # Strict signs: at 0 Clarke's set holds both slopes and all between. A box of nan stays open.
        a = torch.full_like(box.lb, self.negative_slope)
        return Gate(torch.where(box.lb > 0, 1.0, a), torch.where(box.ub < 0, a, 1.0))

    def lipschitz(self, norm: str) -> float:
        return 1.0


class _ReLUInterval(torch.autograd.Function):
    """ReLU of boxes given by centre c and radius r, and of points: rows of `center` beyond those of `radius`.

    The box [max(c - r, 0), max(c + r, 0)] has radius min(max((c + r) / 2, 0), r) and centre max(c, that radius): one
    pass less than through its ends, and exact where the ReLU is stable.

    The backward pass reads the signs of both ends from the outputs, which the next layer keeps anyway: the box before
    the ReLU need not be stored. lb > 0 before exactly where lb > 0 after, likewise ub.
    """

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        out_center, out_radius = torch.empty_like(center), torch.empty_like(radius)
        points = slice(len(radius), None)
        torch.clamp(center[points], min=0, out=out_center[points])
        for b in blocks(radius):
            middle, half, out = center[b], radius[b], out_radius[b]
            torch.add(middle, half, out=out).mul_(0.5).relu_()
            torch.minimum(out, half, out=out)
            torch.maximum(middle, out, out=out_center[b])
        ctx.save_for_backward(out_center, out_radius)
        return out_center, out_radius

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = ctx.saved_tensors
        d_center, d_radius = torch.empty_like(center), torch.empty_like(radius)
        points = slice(len(radius), None)
        _where_positive(grads[0][points], center[points], d_center[points])
        for b in blocks(radius):
            shared = torch.lerp(grads[0][b], grads[1][b], 0.5, out=d_radius[b])
            _where_positive(shared, center[b], shared)  # center > 0 exactly where ub > 0
            active = torch.gt(center[b], radius[b], out=torch.empty_like(shared))  # lb > 0
            # Active neurons pass both gradients on, unstable ones half of their sum to either, the others none.
            torch.lerp(shared, grads[0][b], active, out=d_center[b])
            torch.lerp(shared, grads[1][b], active, out=shared)
        return d_center, d_radius


class _ReLUBackward(torch.autograd.Function):
    """The backward (CROWN) rule of ReLU with the adaptive lower slope, on a box given by centre c and radius r.

    The lower slope is 1 exactly where c > 0, whether the neuron is stable or not. The upper slope is
    s = clamp((c + r) / 2r, 0, 1) and its intercept s max(r - c, 0). A is `[R, B, *shape]`. Written out by hand because
    the general rule takes some forty passes over tensors of A's size when it is differentiated.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(A)
        constant = A.new_empty(A.shape[:2])
        for b in blocks(A, 1):
            slope, drop = _chord(center[b], radius[b])
            negative = A[:, b].clamp(max=0)
            constant[:, b] = torch.einsum("rbn,bn->rb", negative.flatten(2), drop.mul_(slope).flatten(1))
            rising = _where_positive(A[:, b] - negative, center[b].expand_as(negative))
            torch.addcmul(rising, negative, slope, out=out[:, b])
        ctx.save_for_backward(A, center, radius)
        return out, constant

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A, center, radius = ctx.saved_tensors
        d_A, d_center, d_radius = torch.empty_like(A), torch.empty_like(center), torch.empty_like(center)
        for b in blocks(A, 1):
            grad, grad_constant = grads[0][:, b], grads[1][:, b]
            grad_constant = grad_constant.reshape(*grad_constant.shape, *[1] * (A.dim() - 2))
            slope, drop = _chord(center[b], radius[b])
            negative = A[:, b].clamp(max=0)
            through_chord = torch.addcmul(grad, grad_constant, drop)
            # d slope = sum over rows of A- (grad + grad_constant * drop); its own derivatives are 1/2r and -c/2r^2.
            d_slope = (negative * through_chord).sum(0)
            partial = d_slope.div_(radius[b].clamp(min=TINY)).mul_(0.5)
            partial = torch.where((slope > 0) & (slope < 1), partial, 0.0)
            d_drop = (negative * grad_constant).sum(0).mul_(slope)
            d_drop = _where_positive(d_drop, drop)
            torch.sub(partial, d_drop, out=d_center[b])
            torch.addcmul(d_drop, partial, slope.mul(2).sub_(1), value=-1, out=d_radius[b])
            falling = through_chord.mul_(slope)
            rising = _where_positive(grad, center[b].expand_as(grad))
            torch.where(negative < 0, falling, rising, out=d_A[:, b])
        return d_A, d_center, d_radius


TINY = 1e-30


def _chord(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """(slope of the upper line, max(-lb, 0)); intercept = their product."""
    slope = torch.div(center, radius.clamp(min=TINY)).mul_(0.5).add_(0.5).clamp_(0, 1)
    return slope, torch.sub(radius, center).relu_()


def _where_positive(values: Tensor, sign: Tensor, out: Tensor | None = None) -> Tensor:
    """`values` where `sign` is positive, else 0, in `out`: one pass, unlike a product with a mask."""
    if out is None:
        return torch.ops.aten.threshold_backward(values, sign, 0)
    return torch.ops.aten.threshold_backward.grad_input(values, sign, 0, grad_input=out)


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
