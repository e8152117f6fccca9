"""The dual bound of beta-CROWN on a core, with its gradient, for many domains at once (Wang et al. 2021).

For slopes alpha of the relaxation's lower lines and multipliers beta >= 0 of split constraints s z >= 0,

    min  multiplier * output(u, a) + pre . z   >=   min over the region of a linear function of u,

which one backward pass through the core computes. By the envelope theorem the gradient is read off the minimiser of
that function: one forward pass along the lines that the backward pass chose. Nothing is recorded for autograd.

The bound is lowered by what rounding can have done to it (`certify.precision`): a share of the sizes of its terms, and
the slack of the values before activation that `pre` adds up. The share of the output itself is for the caller to take
off: see `certify.bab.search`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from certify.bab.unstable_core import Affine, Core
from certify.precision import ALLOWANCES


@dataclass(frozen=True)
class Slopes:
    """Enclosing lines of all neurons of all domains, each `[N, D]` (or `[N, 1]`)."""

    lower: Tensor
    lower_intercept: Tensor | None
    upper: Tensor
    upper_intercept: Tensor


@dataclass(frozen=True)
class Dual:
    """A dual bound and the linear function of u that gives it.

    Attributes:
        low: lower bound that rounding cannot have raised, `[D]`.
        A: coefficients of the values after activation, `[N, D]`.
        x: coefficients of u, `[M, D]`; constant: `[D]`.
    """

    low: Tensor
    A: Tensor
    x: Tensor
    constant: Tensor

    def select(self, columns: Tensor) -> Dual:
        """Some of the columns."""
        return Dual(*(getattr(self, f.name).index_select(-1, columns) for f in fields(self)))


def backward(
    core: Core, lines: Slopes, output: Affine, multiplier: Tensor, pre: Tensor | None = None, stop: int = 0
) -> Dual:
    """Dual bounds of `multiplier * output + pre . z`.

    Args:
        output: the same function for all columns.
        multiplier: `[D]`.
        pre: coefficients of the values before activation, `[N, D]`.
        stop: number of the first layer to be replaced; `A` then keeps the coefficients of those before it, and the
            bound is none.
    """
    A = output.a * multiplier
    P = torch.zeros_like(A)
    difference = lines.upper - lines.lower
    for layer in reversed(core.layers[stop:]):
        part = layer.part
        here = A[part]
        torch.addcmul(here * lines.lower[part], here.clamp(max=0), difference[part], out=P[part])
        if pre is not None:
            P[part] += pre[part]
        if layer.reads.stop:
            A[layer.reads] += layer.weight.transposed_times(P[part])
    first = core.layers[stop].part.start if stop < len(core.layers) else len(core)
    falling = A[first:].clamp(max=0)
    intercepts = (falling * lines.upper_intercept[first:]).sum(0)
    if lines.lower_intercept is not None:
        intercepts = intercepts + ((A[first:] - falling) * lines.lower_intercept[first:]).sum(0)
    moved = output.constant * multiplier
    constant = moved + intercepts + (core.bias.T @ P)[0]
    x = core.input_weight.transposed_times(P[: core.input_weight.shape[0]]).addmm_(output.x, multiplier.unsqueeze(0))
    low, size = minimum(core, x)
    scale = moved.abs() + intercepts.abs() + (core.bias.abs().T @ P.abs())[0] + size
    allowance = scale * ALLOWANCES[scale.dtype][0]
    if pre is not None:
        allowance = allowance + (core.slack.T @ pre.abs())[0]
    return Dual(low + constant - allowance, A, x, constant)


def minimum(core: Core, x: Tensor) -> tuple[Tensor, Tensor]:
    """(minimum of `x . u` over the region, size of the terms added up), each `[D]`."""
    size = x.abs().sum(0)
    if core.region.ball is None:
        return -size, size
    return torch.maximum(-size, _over_ball(core, x)), size


def minimiser(core: Core, x: Tensor) -> Tensor:
    """A corner of the box, or a point of the ball where that is the tighter bound, that minimises `x . u`: `[M, D]`."""
    corner = x.sign().neg_()
    if core.region.ball is None:
        return corner
    return torch.where(_over_ball(core, x) > -x.abs().sum(0), _in_ball(core, x), corner)


def _over_ball(core: Core, x: Tensor) -> Tensor:
    """Minimum of `x . u` over the ball alone, `[D]`."""
    ball, example = core.region.ball, core.region.x
    assert ball is not None
    gradient = _per_pixel(core, x)
    offset = (example - core.region.center).reshape(1, -1)
    return (gradient * offset).sum(1) - ball.eps_of(example).flatten() * ball.dual_norm(gradient, (1,))


def _in_ball(core: Core, x: Tensor) -> Tensor:
    """The minimiser of `x . u` over the ball alone, `[M, D]`."""
    region = core.region
    assert region.ball is not None
    radius, center, example = (t.reshape(-1, 1) for t in (region.radius, region.center, region.x))
    gradient, eps = _per_pixel(core, x), region.ball.eps_of(region.x)
    if region.ball.norm == "l1":
        # The ball's own steepest step is spread over many pixels, as attacks want it: that is no minimiser.
        step = torch.zeros_like(gradient)
        most = gradient.abs().argmax(1, keepdim=True)
        step.scatter_(1, most, gradient.gather(1, most).sign() * eps.flatten())
    else:
        step = region.ball.steepest(gradient.reshape(-1, *region.x.shape[1:]), eps).flatten(1)
    return (example - step.T - center) / torch.where(radius > 0, radius, 1.0)


def _per_pixel(core: Core, x: Tensor) -> Tensor:
    """Coefficients of the pixels for those of u, `[D, M]`; pixels that cannot move have none."""
    radius = core.region.radius.reshape(1, -1)
    return torch.where(radius > 0, x.T / torch.where(radius > 0, radius, 1.0), 0.0)


def forward(core: Core, lines: Slopes, A: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """Values (before, after) activation, each `[N, D]`, along the lines that the coefficients `A` choose.

    Args:
        fed: what the input adds to the values before activation, `[n, D]`: `input_weight u`.
    """
    rising = A >= 0
    slope = torch.where(rising, lines.lower, lines.upper)
    low = 0.0 if lines.lower_intercept is None else lines.lower_intercept
    intercept = torch.where(rising, low, lines.upper_intercept)
    z = core.bias.repeat(1, fed.shape[1])
    z[: len(fed)] += fed
    a = torch.empty_like(z)
    for layer in core.layers:
        part = layer.part
        if layer.reads.stop:
            z[part] += layer.weight.times(a[layer.reads])
        torch.addcmul(intercept[part], slope[part], z[part], out=a[part])
    return z, a
