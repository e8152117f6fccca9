"""The perturbation set of a batch as bounds see it: a box, and for l2 and l1 the ball that it encloses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.threat import Ball
from certify.interval import BallImage, Interval


def check_pixels(x: Tensor, ball: Ball) -> None:
    """Raise ValueError unless the examples are finite and in the pixel range: elsewhere the cut ball is empty, and
    bounds of it mean nothing."""
    x = x.detach()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x has values that are not finite")
    low, high = ball.pixel_range or (-math.inf, math.inf)
    if len(x) and not (low <= float(x.min()) and float(x.max()) <= high):
        raise ValueError(
            f"x has values from {float(x.min()):g} to {float(x.max()):g}, outside the pixel range [{low:g}, {high:g}]; "
            "give pixels, and let the model's first layer normalise"
        )


@dataclass(frozen=True)
class Region:
    """Every point that the threat model allows around each example.

    Attributes:
        center, radius: the enclosing box, clipped to the pixel range and rounded outward, `[B, *shape]`.
        x: the examples.
        ball: threat model; None where the region is the box itself.
    """

    center: Tensor
    radius: Tensor
    x: Tensor
    ball: Ball | None = None

    @classmethod
    def around(cls, x: Tensor, ball: Ball) -> Region:
        """Region of `ball` around the examples `x` `[B, *shape]`."""
        box = cls.between(*ball.box(x, rounding="outward"))
        return cls(box.center, box.radius, x, None if ball.norm == "linf" else ball)

    @classmethod
    def between(cls, lb: Tensor, ub: Tensor) -> Region:
        """Region of the points between lb and ub, each `[B, *shape]`; their middle stands for the examples."""
        center = (lb + ub) / 2
        # The centre is rounded, so the greater of the two distances is the radius.
        return cls(center, torch.maximum(ub - center, center - lb), center)

    def interval(self) -> Interval:
        """Start of interval propagation."""
        if self.ball is None or self.ball.norm != "l2":
            return Interval(self.center, self.radius)
        eps = self.ball.eps_of(self.x).flatten().expand(len(self.x))
        return Interval(self.center, self.radius, BallImage(self.x, torch.ones_like(self.x[:1]), eps))

    def minimum(self, A: Tensor, constant: Tensor) -> Tensor:
        """Exact minimum over the box, and over the ball where that is greater, of `A x + constant`: `[R, B]`.

        Args:
            A: `[R, B, *shape]`.
            constant: `[R, B]`.
        """
        flat = A.flatten(2)
        low = _dot(flat, self.center) - _dot(flat.abs(), self.radius)
        if self.ball is not None:
            eps = self.ball.eps_of(self.x).flatten()
            low = torch.maximum(low, _dot(flat, self.x) - eps * self.ball.dual_norm(flat, (2,)))
        return low + constant

    def minimiser(self, A: Tensor) -> Tensor:
        """Corner of the box at which `A x` is least, `[R, B, *shape]`."""
        return self.center - A.sign() * self.radius

    def magnitude(self, A: Tensor) -> Tensor:
        """Size of the terms that `minimum` adds up, `[R, B]`: the scale of its rounding error."""
        return _dot(A.flatten(2).abs(), self.center.abs() + self.radius)

    def select(self, index: Tensor) -> Region:
        """Region of a subset of the examples."""
        ball = self.ball and self.ball.select(index)
        return Region(self.center[index], self.radius[index], self.x[index], ball)

    def to(self, dtype: torch.dtype) -> Region:
        """The same region in another precision (exact when widening)."""
        return Region(self.center.to(dtype), self.radius.to(dtype), self.x.to(dtype), self.ball)


def _dot(rows: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("rbn,bn->rb", rows, value.flatten(1))
