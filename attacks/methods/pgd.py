"""Projected gradient descent, for evaluation and for training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.ascent import Ascent, Keep, Survivors, Task, ascend, stronger
from attacks.attack import ATTACKS, noise_of
from attacks.gradient import Precision, forward
from attacks.losses import LOSSES, REFERENCE_LOSSES, Loss, misclassified
from attacks.mode import Mode, Model, attack_mode
from attacks.noise import Generators, normal
from attacks.region import Region, Unit, region_around
from attacks.threat import Ball

Start = Literal["uniform", "gaussian", "clean"]

# Standard deviation of the "gaussian" start: TRADES and its descendants leave the clean point by this much.
GAUSSIAN_START = 1e-3


@ATTACKS.register("pgd")
@dataclass(frozen=True)
class PGD:
    """Projected gradient descent: steps along the steepest direction of the ball's norm, projected back.

    Needs: gradients in the input. Returns: see `keep`; with the default, examples that the model gets wrong anyway
    keep their clean input. Neither sound nor complete: a point that is not fooled proves nothing.

    Args:
        steps, step_size: number and first length of the steps, in `unit`; None is the rule of thumb 2.5 / steps.
        restarts: independent runs; with the default `keep` only examples that hold out are attacked again.
        loss: what is climbed; "kl" is the divergence from the prediction at the clean point (TRADES),
            "logit_differences" the length by which the differences of its logits move; these two need a start other
            than "clean".
        start: "uniform" in the ball, "gaussian" noise of standard deviation 0.001, or "clean".
        decay, decay_at, unit, keep, precision: see Ascent.
        mode: state of the model during the attack, see attacks.mode; attacks of training steps want keep="last" or
            "best" and mode="keep" or "train_frozen".
        seed: key of the noise where the call gets no generator.
        cut_first: in l2, cut by the pixel range and then shorten to the radius (TRADES), not the other way round.

    Source: Madry et al. (2018).
    """

    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    loss: Literal["cross_entropy", "margin", "dlr", "kl", "logit_differences"] = "cross_entropy"
    start: Start = "uniform"
    decay: float = 1.0
    decay_at: tuple[float, ...] = ()
    unit: Unit = "eps"
    keep: Keep = "first_fooled"
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0
    cut_first: bool = False

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        if self.steps < 0 or self.restarts < 1:
            raise ValueError(f"expected steps >= 0 and restarts >= 1, got {self.steps} and {self.restarts}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"expected a finite step_size > 0, got {self.step_size}")
        if self.keep == "last" and self.restarts > 1:
            raise ValueError("keep='last' leaves nothing to compare restarts by; use keep='best' or restarts=1")

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
        pace: Tensor | None = None,
    ) -> Tensor:
        """See `Attack`; `pace` multiplies the steps of every example, `[B]`."""
        noise = noise_of(self.seed, x, generator, index)
        with attack_mode(model, self.mode):
            loss, task, fooled = self._prepare(model, x, y, ball)
            task = replace(task, pace=pace)
            if self.keep == "first_fooled":
                survivors = Survivors(task, fooled)
                for restart in range(self.restarts):
                    rows = survivors.left()
                    if not len(rows):
                        break
                    survivors.add(*self._run(model, loss, task.select(rows), noise(rows, restart)), rows)
                return survivors.points
            points, scores = self._run(model, loss, task, noise(None, 0))
            for restart in range(1, self.restarts):
                points, scores = stronger((points, scores), self._run(model, loss, task, noise(None, restart)))
            return points

    def _run(self, model: Model, loss: Loss, task: Task, generators: Generators) -> tuple[Tensor, Tensor]:
        region = region_around(task.x, task.ball, self.unit, self.cut_first)
        region = region if task.pace is None else region.paced(task.pace)
        start = start_points(self.start, task.x, region, generators)
        return ascend(model, loss, task, start, self._plan(), region)

    def _plan(self) -> Ascent:
        step_size = 2.5 / max(self.steps, 1) if self.step_size is None else self.step_size
        return Ascent(self.steps, step_size, self.decay, self.decay_at, self.unit, self.keep, precision=self.precision)

    def _prepare(self, model: Model, x: Tensor, y: Tensor, ball: Ball) -> tuple[Loss, Task, Tensor | None]:
        """Loss, examples, and which of them are wrong before any attack (None where that does not matter)."""
        if self.loss not in REFERENCE_LOSSES and self.keep != "first_fooled":
            return LOSSES[self.loss], Task(x, (y,), ball), None
        with torch.no_grad():
            clean = forward(model, x, self.precision)
        fooled = misclassified(clean, y) if self.keep == "first_fooled" else None
        if self.loss in REFERENCE_LOSSES:
            return REFERENCE_LOSSES[self.loss], Task(x, (y, clean), ball), fooled
        return LOSSES[self.loss], Task(x, (y,), ball), fooled


def start_points(start: Start, x: Tensor, region: Region, generators: Generators) -> Tensor:
    """Feasible points to climb from, in a tensor of their own."""
    if start == "clean":
        return x.detach().clone()
    if start == "gaussian":
        return region.project_(x + GAUSSIAN_START * normal(x.shape, x, generators))
    return region.sample(generators)
