"""Attacks that look for the nearest misclassified point: what they share, whatever their way there.

Such an attack has no radius of its own. Called with a ball like any attack it stops at the first point inside; its
method `nearest` goes on and gives the distance at which each example falls, and with it the accuracy at every radius.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attacks.gradient import Precision, differentiate, forward
from attacks.losses import strongest_targets, targeted_margin
from attacks.mode import Model
from attacks.threat import Ball

# Keeps the distance to a boundary finite where the gradient is zero; the value of FAB's authors.
TINY = 1e-12


@dataclass(frozen=True)
class Nearest:
    """Nearest misclassified points that were found.

    Attributes:
        points: the shape of the inputs, in the pixel range; the clean input where none was found.
        distances: in the norm of the ball, float64 [B]; 0 where the clean input is misclassified, infinite where no
            point was found.
    """

    points: Tensor
    distances: Tensor

    def inside(self, x: Tensor, ball: Ball) -> Tensor:
        """The points, those outside the ball moved to its border."""
        rows = ball.contains(self.points, x).view((-1,) + (1,) * (x.dim() - 1))
        return torch.where(rows, self.points, ball.project(self.points, x))


class Boundary(Protocol):
    """Linear model of the boundary of the true class that an attack goes for."""

    def __call__(
        self, model: Model, point: Tensor, labels: tuple[Tensor, ...], ball: Ball, precision: Precision
    ) -> tuple[Tensor, Tensor]:
        """(value [B], slope as `point`) of a function that is negative where the model is right, at the point."""


def nearest_boundary(
    model: Model,
    point: Tensor,
    labels: tuple[Tensor, ...],
    ball: Ball,
    precision: Precision = "float32",
    classes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z_t - z_y and its gradient for the class t whose boundary is the nearest one to first order.

    One forward pass and one backward pass per class; memory for two gradients.

    Args:
        labels: true classes y [B], first of the tuple.
        classes: candidates t [B, T]; all wrong classes by default.
    """
    y = labels[0]
    with torch.enable_grad():
        inputs = point.detach().requires_grad_()
        logits = forward(model, inputs, precision)
        candidates = strongest_targets(logits.detach(), y) if classes is None else classes
        margins = (logits.gather(1, candidates) - logits.gather(1, y[:, None])).unbind(1)
    best = point.new_full((len(point),), math.inf)
    value, slope = torch.zeros_like(best), torch.zeros_like(point)
    for rank, margin in enumerate(margins, start=1):
        again = rank < len(margins)
        (gradient,) = torch.autograd.grad(margin, inputs, torch.ones_like(margin), retain_graph=again)
        dual = ball.dual_norm(gradient, tuple(range(1, point.dim())))
        distance = margin.detach().abs() / (dual + TINY)
        closer = distance < best
        best = torch.where(closer, distance, best)
        value = torch.where(closer, margin.detach(), value)
        slope = torch.where(closer.view((-1,) + (1,) * (point.dim() - 1)), gradient, slope)
    return value, slope


def target_boundary(
    model: Model, point: Tensor, labels: tuple[Tensor, ...], ball: Ball, precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """z_t - z_y and its gradient for the target t [B] that follows y in the labels."""
    slope, value, _ = differentiate(model, targeted_margin, point, labels, precision)
    return value, slope
