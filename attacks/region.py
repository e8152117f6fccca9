"""The feasible points around a batch of examples, with whatever can be computed once for all steps of an attack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from torch import Tensor

from attacks.noise import Generators
from attacks.threat import Ball, LinfBall, uniform_between

Unit = Literal["eps", "box"]
"""What a step size of 1 means: the radius of the ball, or for each pixel half the width of the ball cut by the pixel
range (which is narrower for dark and bright pixels)."""


class Region(Protocol):
    def project_(self, point: Tensor) -> Tensor:
        """Move points to feasible ones, in place."""

    def sample(self, generators: Generators) -> Tensor:
        """Random feasible points, uniform in the ball (see Ball.sample)."""

    def climb_(self, point: Tensor, gradient: Tensor, length: float) -> Tensor:
        """Move points by a step of `length` units along the gradient and project them, in place."""

    def paced(self, pace: Tensor) -> Self:
        """The same points, with the unit of a step multiplied by `pace`, one factor per example `[B]`."""

    def select(self, rows: Tensor) -> Self:
        """The region of a subset of the examples."""


def region_around(x: Tensor, ball: Ball, unit: Unit = "eps", cut_first: bool = False) -> Region:
    """Region of the ball around x; the unit "box" exists for Linf only, `cut_first` matters in the other norms only."""
    if not isinstance(ball, LinfBall):
        if unit == "box":
            raise ValueError(f"steps in units of the box need an linf ball, got {ball.norm}")
        return NormRegion(x, ball, cut_first=cut_first)
    lo, hi = ball.box(x)
    if unit == "box":
        return BoxRegion(lo, hi, (hi - lo) / 2)
    return BoxRegion(lo, hi, ball.eps_of(x) if isinstance(ball.eps, Tensor) else ball.eps)


@dataclass(frozen=True)
class BoxRegion:
    """The points between lo and hi; `unit` is a number, one per example [B, 1, ..., 1] or one per pixel."""

    lo: Tensor
    hi: Tensor
    unit: float | Tensor

    def project_(self, point: Tensor) -> Tensor:
        return point.clamp_(self.lo, self.hi)

    def sample(self, generators: Generators) -> Tensor:
        return uniform_between(self.lo, self.hi, generators)

    def climb_(self, point: Tensor, gradient: Tensor, length: float) -> Tensor:
        # The inner loop of training: three passes over the pixels.
        if isinstance(self.unit, Tensor):
            point.addcmul_(gradient.sign(), self.unit, value=length)
        else:
            point.add_(gradient.sign(), alpha=length * self.unit)
        return point.clamp_(self.lo, self.hi)

    def paced(self, pace: Tensor) -> BoxRegion:
        factor = pace.to(self.lo).view((-1,) + (1,) * (self.lo.dim() - 1))
        return BoxRegion(self.lo, self.hi, self.unit * factor)

    def select(self, rows: Tensor) -> BoxRegion:
        unit = self.unit[rows] if isinstance(self.unit, Tensor) else self.unit
        return BoxRegion(self.lo[rows], self.hi[rows], unit)


@dataclass(frozen=True)
class NormRegion:
    """The points of an L2 or L1 ball around x.

    `cut_first` cuts points by the pixel range before they are projected to the ball, rather than behind it.
    """

    x: Tensor
    ball: Ball
    pace: float | Tensor = 1.0
    cut_first: bool = False

    def project_(self, point: Tensor) -> Tensor:
        if self.cut_first and self.ball.pixel_range is not None:
            point.clamp_(*self.ball.pixel_range)
        return point.copy_(self.ball.project(point, self.x))

    def sample(self, generators: Generators) -> Tensor:
        return self.ball.sample(self.x, generators)

    def climb_(self, point: Tensor, gradient: Tensor, length: float) -> Tensor:
        return self.project_(point.add_(self.ball.steepest(gradient, self.ball.eps * self.pace * length, at=point)))

    def paced(self, pace: Tensor) -> NormRegion:
        return replace(self, pace=self.pace * pace)

    def select(self, rows: Tensor) -> NormRegion:
        pace = self.pace[rows] if isinstance(self.pace, Tensor) else self.pace
        return NormRegion(self.x[rows], self.ball.select(rows), pace, self.cut_first)
