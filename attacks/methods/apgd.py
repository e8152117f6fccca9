"""Auto-PGD: projected ascent with momentum whose step size follows from its own progress."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.ascent import WORTH_DROPPING, Survivors, Task
from attacks.attack import ATTACKS, noise_of, require_norm
from attacks.gradient import Precision, differentiate, forward, measure
from attacks.losses import LOSSES, Loss, misclassified, strongest_targets, targeted_dlr
from attacks.mode import Mode, Model, attack_mode
from attacks.noise import Generators, normal, uniform
from attacks.region import Region, region_around
from attacks.threat import Ball, LinfBall

# Published constants, see `climb`.
MOMENTUM = 0.75
RISES = 0.75


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
        mode, precision, seed: see PGD.

    Source: Croce and Hein (2020), algorithm 1.
    """

    steps: int = 100
    restarts: int = 1
    loss: Literal["cross_entropy", "margin", "dlr"] = "cross_entropy"
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        _check_counts(self.steps, self.restarts)

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
        with attack_mode(model, self.mode):
            with torch.no_grad():
                fooled = misclassified(forward(model, x, self.precision), y)
            survivors = Survivors(Task(x, (y,), ball), fooled)
            for restart in range(self.restarts):
                rows = survivors.left()
                if not len(rows):
                    break
                task = survivors.task.select(rows)
                start = start_on_border(task.x, task.ball, noise(rows, restart))
                points, scores = climb(model, LOSSES[self.loss], task, start, self.steps, self.precision)
                survivors.add(points, scores, rows)
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
        steps, restarts, mode, precision, seed: see APGD.

    Source: Croce and Hein (2020).
    """

    steps: int = 100
    targets: int = 9
    restarts: int = 1
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        _check_counts(self.steps, self.restarts)
        if self.targets < 1:
            raise ValueError(f"expected targets >= 1, got {self.targets}")

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
        with attack_mode(model, self.mode):
            with torch.no_grad():
                clean = forward(model, x, self.precision)
            targets = strongest_targets(clean, y, self.targets)
            survivors = Survivors(Task(x, (y,), ball), misclassified(clean, y))
            for restart in range(self.restarts):
                for rank in range(targets.shape[1]):
                    rows = survivors.left()
                    if not len(rows):
                        return survivors.points
                    task = survivors.task.select(rows)
                    task = replace(task, labels=(task.labels[0], targets[rows, rank]))
                    start = start_on_border(task.x, task.ball, noise(rows, restart, rank))
                    survivors.add(*climb(model, targeted_dlr, task, start, self.steps, self.precision), rows)
            return survivors.points


def checkpoints(steps: int) -> list[int]:
    """Numbers of iterations after which the step size is judged: 22, 41, 57, 70, 80, 87, 93, 99 for 100 steps."""
    period, shorter, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, mark = [], period
    while mark <= steps:
        marks.append(mark)
        period = max(period - shorter, shortest)
        mark += period
    return marks


def start_on_border(x: Tensor, ball: Ball, generators: Generators) -> Tensor:
    """Random start whose move has length eps before it is cut by the pixel range."""
    if isinstance(ball, LinfBall):
        noise = uniform(x.shape, x, generators).mul_(2).sub_(1)
        length = noise.flatten(1).abs().amax(1)
    else:
        noise = normal(x.shape, x, generators)
        length = noise.flatten(1).norm(dim=1)
    # Divided by the length, not multiplied by its reciprocal: the longest pixel moves by eps exactly.
    noise /= length.clamp_(min=torch.finfo(x.dtype).tiny).view((-1,) + (1,) * (x.dim() - 1))
    return ball.project(x + ball.eps_of(x) * noise, x)


def climb(
    model: Model, loss: Loss, task: Task, start: Tensor, steps: int, precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """One run of Auto-PGD from feasible points; an example ends at its first misclassified point.

    The step is 2 eps at first. At each checkpoint it is halved, and the climb goes on from the best point so far,
    where the loss rose in at most 75 % of the steps since the last checkpoint, or where neither the best loss grew
    nor the step was halved since then. The first rise is measured from the start, as in the paper. After a return to
    the best point the momentum still refers to the point before the return, as in the authors' code.

    Returns:
        points and scores [B] as `ascent.ascend` does: the loss, infinite where fooled.
    """
    state = _Climber.begin(model, loss, task, start, precision)
    results = Survivors(task)
    rows = torch.arange(len(task.x), device=task.x.device)
    marks = checkpoints(steps)
    for step in range(1, steps + 1):
        done = state.fooled
        if int(done.sum()) > WORTH_DROPPING * len(done):
            results.add(state.best_point, state.scores(), rows)
            left = (~done).nonzero().squeeze(1)
            if not len(left):
                return results.points, results.scores
            rows, state = rows[left], state.select(left)
        state.move(first=step == 1)
        # The gradient of the last point would serve no further step.
        state.look(model, loss, precision, gradient=step < steps)
        if step in marks:
            state.judge(period=step - max([mark for mark in marks if mark < step], default=0))
    results.add(state.best_point, state.scores(), rows)
    return results.points, results.scores


@dataclass
class _Climber:
    """State of Auto-PGD; every tensor has the example as its first axis."""

    task: Task
    region: Region
    step: Tensor  # length of the step, pixel units
    point: Tensor
    before: Tensor  # the iterate before `point`
    gradient: Tensor
    value: Tensor  # loss at `point`
    best_point: Tensor
    best_gradient: Tensor
    best_value: Tensor
    mark_value: Tensor  # best loss at the last checkpoint
    halved: Tensor  # whether the step was halved there
    rises: Tensor  # steps with a rising loss since then
    fooled: Tensor

    @classmethod
    def begin(cls, model: Model, loss: Loss, task: Task, start: Tensor, precision: Precision) -> _Climber:
        gradient, value, logits = differentiate(model, loss, start, task.labels, precision)
        return cls(
            task=task,
            region=region_around(task.x, task.ball),
            step=2 * task.ball.eps_of(task.x).view(-1),
            point=start,
            before=start,
            gradient=gradient,
            value=value,
            best_point=start.clone(),
            best_gradient=gradient.clone(),
            best_value=value,
            mark_value=value,
            halved=torch.ones_like(value, dtype=torch.bool),
            rises=torch.zeros_like(value),
            fooled=misclassified(logits, task.labels[0]),
        )

    def select(self, rows: Tensor) -> _Climber:
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, task=self.task.select(rows), region=self.region.select(rows), **tensors)

    def scores(self) -> Tensor:
        return self.best_value.masked_fill(self.fooled, math.inf)

    def move(self, first: bool) -> None:
        """One step along the gradient, blended with the last move; both projected."""
        weight = 1.0 if first else MOMENTUM
        target = self.region.project_(self.point + self.task.ball.steepest(self.gradient, self.step, at=self.point))
        blend = self.point + weight * (target - self.point) + (1 - weight) * (self.point - self.before)
        self.before, self.point = self.point, self.region.project_(blend)

    def look(self, model: Model, loss: Loss, precision: Precision, gradient: bool) -> None:
        """Loss, prediction and gradient at the new point; the best point follows."""
        if gradient:
            self.gradient, value, logits = differentiate(model, loss, self.point, self.task.labels, precision)
        else:
            value, logits = measure(model, loss, self.point, self.task.labels, precision)
        self.rises = self.rises + (value > self.value)
        self.value = value
        fooled = misclassified(logits, self.task.labels[0])
        # What was fooled keeps the point that fooled it; what is fooled now takes this one, whatever its loss.
        better = ((value > self.best_value) | fooled) & ~self.fooled
        self.best_point = _where(better, self.point, self.best_point)
        self.best_gradient = _where(better, self.gradient, self.best_gradient)
        self.best_value = torch.where(better, value, self.best_value)
        self.fooled = self.fooled | fooled

    def judge(self, period: int) -> None:
        """Halve the step and return to the best point where the last period made too little progress."""
        stalled = ~self.halved & (self.mark_value >= self.best_value)
        self.halved = (self.rises <= RISES * period) | stalled
        self.mark_value = self.best_value
        self.rises = torch.zeros_like(self.rises)
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.point = _where(self.halved, self.best_point, self.point)
        self.gradient = _where(self.halved, self.best_gradient, self.gradient)


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view((-1,) + (1,) * (yes.dim() - 1)), yes, no)


def _check_counts(steps: int, restarts: int) -> None:
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps >= 1 and restarts >= 1, got {steps} and {restarts}")
