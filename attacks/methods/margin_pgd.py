"""PGD on the margin of every wrong class: the search for a counterexample before a proof is attempted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attacks.ascent import Ascent, Survivors, Task, ascend
from attacks.attack import ATTACKS, Noise, noise_of
from attacks.gradient import Precision, forward
from attacks.losses import misclassified, strongest_targets, targeted_margin
from attacks.methods.pgd import Start, start_points
from attacks.mode import Mode, Model, attack_mode
from attacks.region import Region, Unit, region_around
from attacks.threat import Ball


@ATTACKS.register("margin_pgd")
@dataclass(frozen=True)
class MarginPGD:
    """Projected ascent on z_t - z_y for every target t; any misclassification ends the attack on an example.

    Needs: gradients in the input. Returns: a misclassified point, else the one with the largest margin of any target;
    examples that the model gets wrong anyway keep their clean input. Works where cross-entropy is saturated.
    Neither sound nor complete.

    How: the targets of an example, strongest first at the clean point, are searched side by side, as many at a time as
    `rows` allows; an example whose one target succeeds leaves with all of them.

    Args:
        steps, step_size, restarts, start, decay, decay_at, unit, mode, precision, seed: see PGD.
        targets: number of wrong classes tried, strongest first; None for all.
        rows: largest number of (example, target) pairs in one pass.

    Source: Gowal et al. (2019), MultiTargeted.
    """

    steps: int = 50
    step_size: float | None = 0.25
    restarts: int = 1
    targets: int | None = None
    start: Start = "uniform"
    decay: float = 0.1
    decay_at: tuple[float, ...] = (0.5, 0.8)
    unit: Unit = "eps"
    rows: int = 1024
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        if self.steps < 0 or self.restarts < 1 or self.rows < 1 or (self.targets is not None and self.targets < 1):
            raise ValueError(f"expected steps >= 0 and restarts, rows, targets >= 1, got {self}")

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
        noise = noise_of(self.seed, x, generator, index)
        with attack_mode(model, self.mode):
            with torch.no_grad():
                clean = forward(model, x, self.precision)
            targets = strongest_targets(clean, y, self.targets)
            survivors = Survivors(Task(x, (y,), ball), misclassified(clean, y))
            for restart in range(self.restarts):
                self._try_targets(model, survivors, targets, restart, noise)
            return survivors.points

    def _try_targets(self, model: Model, survivors: Survivors, targets: Tensor, restart: int, noise: Noise) -> None:
        tried = 0
        while tried < targets.shape[1] and len(left := survivors.left()):
            width = min(max(self.rows // len(left), 1), targets.shape[1] - tried)
            for rows in left.split(self.rows):
                task = survivors.task.select(rows)
                region = region_around(task.x, task.ball, self.unit)
                # Keyed by the rank of the target: the start of a pair does not depend on what runs beside it.
                starts = [
                    start_points(self.start, task.x, region, noise(rows, restart, rank))
                    for rank in range(tried, tried + width)
                ]
                ranked = targets[rows, tried : tried + width]
                survivors.add(*self._run(model, task, region, ranked, torch.cat(starts)), rows)
            tried += width

    def _run(self, model: Model, task: Task, region: Region, targets: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Attack n examples on the targets [n, T] at once, start [T n, ...], and keep the best target of each."""
        count, width = targets.shape
        example = torch.arange(count, device=targets.device).repeat(width)
        pairs = task.select(example)
        pairs = replace(pairs, labels=(pairs.labels[0], targets.t().reshape(-1)), owner=example)
        points, scores = ascend(model, targeted_margin, pairs, start, self._plan(), region.select(example))
        scores, best = scores.view(width, count).max(dim=0)
        return points[best * count + example[:count]], scores

    def _plan(self) -> Ascent:
        step_size = 2.5 / max(self.steps, 1) if self.step_size is None else self.step_size
        return Ascent(self.steps, step_size, self.decay, self.decay_at, self.unit, precision=self.precision)
