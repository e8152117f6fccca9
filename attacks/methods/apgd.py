"""Auto-PGD (Croce and Hein 2020) on one loss, and on the targeted DLR loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attacks.ascent import Survivors, Task
from attacks.attack import ATTACKS, noise_of, require_norm
from attacks.auto_pgd import climb, start_on_border
from attacks.gradient import Precision, prepared
from attacks.losses import LOSSES, Loss, misclassified, strongest_targets, targeted_dlr
from attacks.mode import Mode, Model, attack_mode
from attacks.noise import Generators, normal
from attacks.threat import Ball, L1Ball

# L1: multiples of eps, and the share of the steps spent in a ball of that radius; the rest is spent at eps.
WIDER_BALLS = ((3, 0.3), (2, 0.3))


@ATTACKS.register("apgd")
@dataclass(frozen=True)
class APGD:
    """Auto-PGD on one loss.

    Needs: gradients in the input. Returns: a misclassified point, else the one with the largest loss (the reference
    returns the clean point there); examples that the model gets wrong anyway keep their clean input. Neither sound
    nor complete.

    Args:
        steps, restarts: length and number of the runs; later runs attack what the earlier ones left.
        loss: what is climbed.
        wide_start: L1 only: spend 30 % of the steps in the ball of three times the radius and 30 % in that of twice
            the radius, each run starting at the best point of the one before.
        samples: gradients averaged at each step, for models with noise of their own.
        mode, precision, seed: see PGD.

    Source: Croce and Hein (2020), algorithm 1; for L1 "Mind the box" (2021), algorithm 1.
    """

    steps: int = 100
    restarts: int = 1
    loss: Literal["cross_entropy", "margin", "dlr"] = "cross_entropy"
    wide_start: bool = True
    samples: int = 1
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        _check_counts(self.steps, self.restarts, self.samples)

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
        require_norm(self, ball)
        noise = noise_of(self.seed, x, generator, index)
        run = Run(self.steps, self.wide_start, self.precision, self.samples)
        with attack_mode(model, self.mode):
            model, clean = prepared(model, self.mode, x, self.precision)
            fooled = misclassified(clean, y)
            survivors = Survivors(Task(x, (y,), ball), fooled)
            for restart in range(self.restarts):
                rows = survivors.left()
                if not len(rows):
                    break
                task = survivors.task.select(rows)
                survivors.add(*run(model, LOSSES[self.loss], task, noise(rows, restart)), rows)
            return survivors.points


@ATTACKS.register("apgd_t")
@dataclass(frozen=True)
class APGDT:
    """Auto-PGD on the targeted DLR loss, one target after the other; any misclassification counts.

    Needs and returns: see APGD. The targets are the wrong classes with the largest logits at the clean point, and
    each is tried on the examples that the targets before it left. With fewer than four classes the loss is not the
    published one (see `targeted_dlr`).

    Args:
        targets: number of targets, at most K - 1 are used.
        steps, restarts, wide_start, samples, mode, precision, seed: see APGD.

    Source: Croce and Hein (2020).
    """

    steps: int = 100
    targets: int = 9
    restarts: int = 1
    wide_start: bool = True
    samples: int = 1
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        _check_counts(self.steps, self.restarts, self.samples)
        if self.targets < 1:
            raise ValueError(f"expected targets >= 1, got {self.targets}")

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
        require_norm(self, ball)
        noise = noise_of(self.seed, x, generator, index)
        run = Run(self.steps, self.wide_start, self.precision, self.samples)
        with attack_mode(model, self.mode):
            model, clean = prepared(model, self.mode, x, self.precision)
            targets = strongest_targets(clean, y, self.targets)
            survivors = Survivors(Task(x, (y,), ball), misclassified(clean, y))
            for restart in range(self.restarts):
                for rank in range(targets.shape[1]):
                    rows = survivors.left()
                    if not len(rows):
                        return survivors.points
                    task = survivors.task.select(rows)
                    task = replace(task, labels=(task.labels[0], targets[rows, rank]))
                    survivors.add(*run(model, targeted_dlr, task, noise(rows, restart, rank)), rows)
            return survivors.points


@dataclass(frozen=True)
class Run:
    """One run of Auto-PGD from a random start; the fields are those of APGD."""

    steps: int
    wide_start: bool
    precision: Precision
    samples: int

    def __call__(self, model: Model, loss: Loss, task: Task, generators: Generators) -> tuple[Tensor, Tensor]:
        """Points and scores [B], see `climb`."""
        how: dict[str, Any] = {"precision": self.precision, "samples": self.samples}
        if not isinstance(task.ball, L1Ball):
            start = start_on_border(task.x, task.ball, generators)
            return climb(model, loss, task, start, self.steps, **how)
        point = task.x + normal(task.x.shape, task.x, generators)
        left = self.steps
        for factor, share in WIDER_BALLS if self.wide_start else ():
            steps = int(share * self.steps)
            wide = replace(task, ball=task.ball.scaled(factor))
            point = wide.ball.project(point, task.x)
            point, _ = climb(model, loss, wide, point, steps, **how, warm=True, ends=False)
            left -= steps
        return climb(model, loss, task, task.ball.project(point, task.x), left, **how, warm=self.wide_start)


def _check_counts(steps: int, restarts: int, samples: int) -> None:
    if min(steps, restarts, samples) < 1:
        raise ValueError(f"expected steps, restarts and samples >= 1, got {steps}, {restarts} and {samples}")
