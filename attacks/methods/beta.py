"""BETA: the best target of all, each searched by ascent on its margin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.ascent import Task
from attacks.attack import ATTACKS, Noise, noise_of, require_norm
from attacks.gradient import Precision, differentiate, forward, measure
from attacks.losses import strongest_targets, targeted_margin
from attacks.mode import Mode, Model, attack_mode
from attacks.region import region_around
from attacks.threat import Ball

# Keeps the quotient of RMSprop finite; the default of PyTorch's.
TINY = 1e-8


@ATTACKS.register("beta")
@dataclass(frozen=True)
class BETA:
    """Best targeted attack: RMSprop on z_t - z_y for every wrong class, of which the largest margin at the end wins.

    Needs: gradients in the input, for every target. Returns: the last point of the target with the largest margin,
    also where the clean input is misclassified: a training step wants the worst point of every example. Neither sound
    nor complete. Unreproduced: the paper's step size, number of steps and constants of RMSprop were not at hand.

    Args:
        steps, step_size: number and size of the steps, in units of eps; RMSprop's first step is longer by
            1 / sqrt(1 - smoothing).
        smoothing: memory of the mean squared gradient.
        targets: number of wrong classes tried, strongest first at the clean point; None for all, as in the paper.
        rows: largest number of (example, target) pairs in one pass.
        mode, precision, seed: see PGD.

    Source: Robey et al. (2023), "Adversarial training should be cast as a non-zero-sum game", algorithm 1.
    """

    steps: int = 20
    step_size: float = 0.1
    smoothing: float = 0.99
    targets: int | None = None
    rows: int = 1024
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    keep: ClassVar[Literal["last"]] = "last"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rows < 1 or (self.targets is not None and self.targets < 1):
            raise ValueError(f"expected steps >= 0 and rows, targets >= 1, got {self}")
        if self.step_size <= 0 or not 0 <= self.smoothing < 1:
            raise ValueError(f"expected step_size > 0 and 0 <= smoothing < 1, got {self}")

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
        points, margins = self.candidates(model, x, y, ball, generator=generator, index=index)
        best = margins.argmax(1)
        return points[torch.arange(len(x), device=x.device), best]

    @torch.no_grad()
    def candidates(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last point for each target, [B, T, ...], and its margin z_t - z_y, [B, T] (what SBETA weighs)."""
        require_norm(self, ball)
        noise = noise_of(self.seed, x, generator, index)
        with attack_mode(model, self.mode):
            with torch.no_grad():
                targets = strongest_targets(forward(model, x, self.precision), y, self.targets)
            width = max(self.rows // max(len(x), 1), 1)
            found = [
                self._search(model, Task(x, (y,), ball), targets[:, first : first + width], first, noise)
                for first in range(0, targets.shape[1], width)
            ]
        points, margins = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return points, margins

    def _search(self, model: Model, task: Task, targets: Tensor, first: int, noise: Noise) -> tuple[Tensor, Tensor]:
        """Points [B, T, ...] and margins [B, T] of some targets [B, T], whose ranks start with `first`."""
        count, width = targets.shape
        around = region_around(task.x, task.ball)
        # Keyed by the rank of the target: the start of a pair does not depend on what runs beside it.
        starts = [around.sample(noise(None, first + rank)) for rank in range(width)]
        example = torch.arange(count, device=targets.device).repeat(width)
        pairs = task.select(example)
        pairs = replace(pairs, labels=(pairs.labels[0], targets.t().reshape(-1)))
        region, point = around.select(example), torch.cat(starts)
        length = self.step_size * pairs.ball.eps_of(pairs.x)
        squares = torch.zeros_like(point)
        for _ in range(self.steps):
            gradient, _, _ = differentiate(model, targeted_margin, point, pairs.labels, self.precision)
            squares.mul_(self.smoothing).addcmul_(gradient, gradient, value=1 - self.smoothing)
            region.project_(point.add_(length * gradient / (squares.sqrt() + TINY)))
        margins, _ = measure(model, targeted_margin, point, pairs.labels, self.precision)
        points = point.view(width, count, *point.shape[1:]).transpose(0, 1)
        return points, margins.view(width, count).t()
