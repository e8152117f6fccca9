"""The dual bound of beta-CROWN on a core, with its gradient, for many domains at once (Wang et al. 2021).

For slopes alpha of the relaxation's lower lines and multipliers beta >= 0 of split constraints s z >= 0,

    min  multiplier * output(u, a) + pre . z   >=   min over the region of a linear function of u,

which one backward pass through the core computes. By the envelope theorem the gradient is read off the minimiser of
that function: one forward pass along the lines that the backward pass chose. Nothing is recorded for autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify.bab.core import Affine, Core


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
        low: lower bound, `[D]`.
        A: coefficients of the values after activation, `[N, D]`.
        x: coefficients of u, `[M, D]`; constant: `[D]`.
        scale: sum of the sizes of the terms that were added up, `[D]`.
    """

    low: Tensor
    A: Tensor
    x: Tensor
    constant: Tensor
    scale: Tensor


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
    return Dual(low + constant, A, x, constant, scale)


def minimum(core: Core, x: Tensor) -> tuple[Tensor, Tensor]:
    """(minimum of `x . u` over the region, size of the terms added up), each `[D]`."""
    size = x.abs().sum(0)
    low, region = -size, core.region
    if region.ball is not None:
        inner = _in_ball(core, x)
        low = torch.maximum(low, (x * inner).sum(0))
    return low, size


def minimiser(core: Core, x: Tensor) -> Tensor:
    """A corner of the box, or a point of the ball where that is the tighter bound, that minimises `x . u`: `[M, D]`."""
    corner = x.sign().neg_()
    if core.region.ball is None:
        return corner
    inner = _in_ball(core, x)
    return torch.where((x * inner).sum(0) > (x * corner).sum(0), inner, corner)


def _in_ball(core: Core, x: Tensor) -> Tensor:
    """The minimiser of `x . u` over the ball alone, `[M, D]`."""
    region = core.region
    assert region.ball is not None
    radius, center = region.radius.reshape(-1, 1), region.center.reshape(-1, 1)
    # A pixel that cannot move has no part in x, whatever is made of it.
    safe = torch.where(radius > 0, radius, 1.0)
    gradient = (x / safe).T.reshape(-1, *region.x.shape[1:])
    step = region.ball.steepest(gradient, region.ball.eps_of(region.x))
    point = region.x.reshape(-1, 1) - step.reshape(len(gradient), -1).T
    return (point - center) / safe


def forward(core: Core, lines: Slopes, A: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Values (before, after) activation, each `[N, D]`, at `u` along the lines that the coefficients `A` choose."""
    rising = A >= 0
    slope = torch.where(rising, lines.lower, lines.upper)
    low = 0.0 if lines.lower_intercept is None else lines.lower_intercept
    intercept = torch.where(rising, low, lines.upper_intercept)
    z = core.bias.repeat(1, u.shape[1])
    z[: core.input_weight.shape[0]] += core.input_weight.times(u)
    a = torch.empty_like(z)
    for layer in core.layers:
        part = layer.part
        if layer.reads.stop:
            z[part] += layer.weight.times(a[layer.reads])
        torch.addcmul(intercept[part], slope[part], z[part], out=a[part])
    return z, a
