"""DeepFool: repeated steps onto the nearest linearised boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.attack import ATTACKS, require_norm
from attacks.gradient import Precision, forward, prepared
from attacks.losses import misclassified, strongest_targets
from attacks.mode import Mode, Model, attack_mode
from attacks.nearest import Nearest, nearest_boundary
from attacks.threat import Ball

# Added to the distance of the boundary, so that a step is never zero; the value of the authors' code.
LEAST_STEP = 1e-4


@ATTACKS.register("deepfool")
@dataclass(frozen=True)
class DeepFool:
    """DeepFool: steps to the boundary that is nearest to first order, until the class changes.

    Needs: gradients in the input, of each candidate class at every step. Returns: the misclassified point where it is
    inside the ball, else that point moved to the ball's border. Neither sound nor complete. Weaker than FAB: it stops
    at the first point beyond the boundary.

    Args:
        steps: largest number of steps.
        overshoot: share by which the sum of all steps is lengthened.
        classes: number of candidate classes, those with the largest logits at the clean point, the true one included.
        mode, precision, seed: see PGD; there is no noise.

    Departs from the authors' code in that points are cut by the pixel range.

    Source: Moosavi-Dezfooli et al. (2016), algorithm 2; the dual norm gives Linf.
    """

    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.overshoot < 0 or self.classes < 2:
            raise ValueError(f"expected steps >= 1, overshoot >= 0 and classes >= 2, got {self}")

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return self.nearest(model, x, y, ball).inside(x, ball)

    @torch.no_grad()
    def nearest(self, model: Model, x: Tensor, y: Tensor, ball: Ball) -> Nearest:
        """The misclassified point of each example, however far; the ball gives norm and pixel range."""
        require_norm(self, ball)
        ball.require_radii(x)
        with attack_mode(model, self.mode):
            model, clean = prepared(model, self.mode, x, self.precision)
            classes, fooled = strongest_targets(clean, y, self.classes - 1), misclassified(clean, y)
            points, total = x.detach().clone(), torch.zeros_like(x)
            for _ in range(self.steps):
                rows = (~fooled).nonzero().squeeze(1)
                if not len(rows):
                    break
                here = ball.select(rows)
                value, slope = nearest_boundary(model, points[rows], (y[rows],), here, self.precision, classes[rows])
                distance = value.abs() / here.dual_norm(slope, tuple(range(1, x.dim()))).clamp(min=LEAST_STEP**2)
                total[rows] += here.steepest(slope, distance + LEAST_STEP)
                points[rows] = here.cut(x[rows] + (1 + self.overshoot) * total[rows])
                with torch.no_grad():
                    fooled[rows] = misclassified(forward(model, points[rows], self.precision), y[rows])
            unchanged = (-1,) + (1,) * (x.dim() - 1)
            distances = ball.length(points - x).masked_fill(~fooled, math.inf)
            return Nearest(torch.where(fooled.view(unchanged), points, x), distances)
