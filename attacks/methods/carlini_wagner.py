"""Carlini and Wagner's attack for L2: a short move and a wrong class, weighed against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.attack import ATTACKS, require_norm
from attacks.gradient import Precision, forward, prepared
from attacks.losses import margin, misclassified
from attacks.mode import Mode, Model, attack_mode
from attacks.nearest import Nearest
from attacks.threat import Ball

# Pixels at the border of the range would have an infinite inverse and a gradient of zero, and never move.
SHRINK = 0.999999

# Constants of Adam.
FIRST_MOMENT, SECOND_MOMENT, ADAM_TINY = 0.9, 0.999, 1e-8

# A search ends for an example whose loss did not fall by this share within a tenth of the steps.
PROGRESS = 0.9999


@ATTACKS.register("carlini_wagner")
@dataclass(frozen=True)
class CarliniWagner:
    """Carlini and Wagner's L2 attack: Adam on |x' - x|^2 + c max(z_y - max z_i + confidence, 0).

    Needs: gradients in the input, very many. Returns: the nearest misclassified point where it is inside the ball, else
    that point moved to the ball's border. Neither sound nor complete. The pixel range is kept by a change of variables,
    x' = tanh.

    Args:
        steps: largest number of steps of one search; an example whose loss stalls ends earlier.
        searches: number of weights c tried: times 10 until one succeeds, then bisection between failure and success.
        weight: the first c.
        step_size: of Adam, in the transformed variables.
        confidence: margin by which the wrong class must win.
        mode, precision, seed: see PGD; there is no noise.

    Source: Carlini and Wagner (2017), section VI, with the constants of the authors' code.
    """

    steps: int = 10000
    searches: int = 9
    weight: float = 1e-3
    step_size: float = 0.01
    confidence: float = 0.0
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.searches < 1 or self.weight <= 0 or self.step_size <= 0 or self.confidence < 0:
            raise ValueError(f"expected steps, searches >= 1, weight, step_size > 0 and confidence >= 0, got {self}")

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
        """The nearest misclassified point found for each example, however far; the ball gives the pixel range."""
        require_norm(self, ball)
        ball.require_radii(x)
        if ball.pixel_range is None:
            raise ValueError("carlini_wagner searches inside a pixel range, and the ball has none")
        with attack_mode(model, self.mode):
            model, clean = prepared(model, self.mode, x, self.precision)
            fooled = misclassified(clean, y)
            rows = (~fooled).nonzero().squeeze(1)
            points = x.detach().clone()
            distances = ball.length(points - x).masked_fill(~fooled, math.inf)
            low, high = (torch.full_like(distances, limit) for limit in (0.0, math.inf))
            weight = torch.full_like(distances, self.weight)
            for _ in range(self.searches if len(rows) else 0):
                found, lengths = self._search(model, x[rows], y[rows], ball.select(rows), weight[rows])
                closer = rows[lengths < distances[rows]]
                points[closer] = found[lengths < distances[rows]]
                distances[rows] = torch.minimum(lengths, distances[rows])
                success = torch.zeros_like(fooled).index_put_((rows,), lengths < math.inf)
                high = torch.where(success, weight.minimum(high), high)
                low = torch.where(success, low, weight.maximum(low))
                weight = torch.where(high < math.inf, (low + high) / 2, weight * 10)
            return Nearest(points, distances)

    def _search(self, model: Model, x: Tensor, y: Tensor, ball: Ball, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest misclassified points for one weight c per example, and their distances, infinite where none."""
        low, high = ball.pixel_range or (0.0, 1.0)
        middle, half = (high + low) / 2, (high - low) / 2
        variable = torch.atanh(((x - middle) / half) * SHRINK)
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        points, lengths = x.clone(), x.new_full((len(x),), math.inf, dtype=torch.float64)
        rows = torch.arange(len(x), device=x.device)
        reference = torch.full_like(lengths, math.inf)
        for step in range(1, self.steps + 1):
            candidate = torch.tanh(variable[rows]) * half + middle
            loss, gradient, fooled = self._loss(model, candidate, x[rows], y[rows], weight[rows])
            length = ball.length(candidate - x[rows])
            closer = fooled & (length < lengths[rows])
            points[rows[closer]] = candidate[closer]
            lengths[rows[closer]] = length[closer]
            gradient *= half * (1 - ((candidate - middle) / half) ** 2)
            first[rows] = first[rows].lerp(gradient, 1 - FIRST_MOMENT)
            second[rows] = second[rows].lerp(gradient**2, 1 - SECOND_MOMENT)
            scale = (second[rows] / (1 - SECOND_MOMENT**step)).sqrt_().add_(ADAM_TINY)
            variable[rows] -= self.step_size / (1 - FIRST_MOMENT**step) * first[rows] / scale
            if step % max(self.steps // 10, 1) == 0:
                moving = loss <= PROGRESS * reference[rows]
                reference[rows] = loss
                rows = rows[moving]
                if not len(rows):
                    break
        return points, lengths

    def _loss(self, model: Model, point: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [B], its gradient in the point, whether the wrong class wins by the confidence [B])."""
        with torch.enable_grad():
            inputs = point.detach().requires_grad_()
            logits = forward(model, inputs, self.precision)
            shortfall = (self.confidence - margin(logits, y)).clamp(min=0.0)
            loss = (inputs - x).square().flatten(1).sum(1) + weight.to(x.dtype) * shortfall
            (gradient,) = torch.autograd.grad(loss.sum(), inputs)
        fooled = misclassified(logits, y) & (shortfall <= 0)
        return loss.detach().double(), gradient, fooled.detach()
