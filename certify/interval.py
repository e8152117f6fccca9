"""Boxes by centre and radius: the state that interval bound propagation carries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BallImage:
    """The image of an l2 ball under a diagonal affine map: {point + scale * d : ||d||_2 <= eps}.

    The first dense or convolutional layer turns it into a box by the dual norm, which is far tighter than the box
    around the ball.

    Attributes:
        point: image of the ball's centre `[B, *shape]`.
        scale: positive factors, broadcastable to `[B, *shape]`.
        eps: radius per example, `[B]`.
    """

    point: Tensor
    scale: Tensor
    eps: Tensor

    def meet(self, interval: Interval, point: Tensor, row_norm: Tensor) -> Interval:
        """Box that lies in `interval` and in the affine image with centre `point` and row norms `row_norm`."""
        deviation = self.eps.view(-1, *[1] * (point.dim() - 1)) * row_norm
        return Interval.from_box(
            torch.maximum(interval.lb, point - deviation), torch.minimum(interval.ub, point + deviation)
        )


@dataclass(frozen=True)
class Interval:
    """Elementwise box `[center - radius, center + radius]`, each `[B, *shape]`, radius >= 0.

    `ball` is kept only up to the first layer that mixes coordinates (see BallImage).
    """

    center: Tensor
    radius: Tensor
    ball: BallImage | None = None

    @classmethod
    def from_box(cls, lb: Tensor, ub: Tensor) -> Interval:
        """Interval of the box [lb, ub]."""
        return cls((lb + ub) / 2, (ub - lb) / 2)

    @property
    def lb(self) -> Tensor:
        return self.center - self.radius

    @property
    def ub(self) -> Tensor:
        return self.center + self.radius


@dataclass(frozen=True)
class BoxesAndPoints:
    """B boxes, and points that go through the same layers beside them.

    Centres and points are one tensor, so that one call of a layer serves both.

    Attributes:
        values: the boxes' centres, then the points, `[B + P, *shape]`.
        radius: of the boxes, `[B, *shape]`.
    """

    values: Tensor
    radius: Tensor

    @classmethod
    def of(cls, boxes: Interval, points: Tensor) -> BoxesAndPoints:
        """Boxes (without a `ball`) and points `[P, *shape]`, put together."""
        assert boxes.ball is None
        return cls(torch.cat([boxes.center, points]), boxes.radius)

    @property
    def boxes(self) -> Interval:
        return Interval(self.values[: len(self.radius)], self.radius)

    @property
    def points(self) -> Tensor:
        return self.values[len(self.radius) :]
