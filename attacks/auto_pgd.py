"""Auto-PGD: the ascent behind APGD and APGD-T, whose step size follows from its own progress.

Shapes are those of `attacks.ascent`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attacks.ascent import WORTH_DROPPING, Survivors, Task
from attacks.gradient import Precision, differentiate, measure
from attacks.losses import Loss, misclassified
from attacks.mode import Model
from attacks.noise import Generators, normal, uniform
from attacks.region import Region, region_around
from attacks.threat import Ball, L1Ball, LinfBall

# Published constants, see `climb`.
MOMENTUM = 0.75
RISES = 0.75


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
    else:
        noise = normal(x.shape, x, generators)
    length = ball.length(noise).to(x.dtype)
    # Divided by the length, not multiplied by its reciprocal: the longest pixel moves by eps exactly.
    noise /= length.clamp_(min=torch.finfo(x.dtype).tiny).view((-1,) + (1,) * (x.dim() - 1))
    return ball.project(x + ball.eps_of(x) * noise, x)


def climb(
    model: Model,
    loss: Loss,
    task: Task,
    start: Tensor,
    steps: int,
    precision: Precision = "float32",
    samples: int = 1,
    warm: bool = False,
    ends: bool = True,
) -> tuple[Tensor, Tensor]:
    """One run of Auto-PGD from feasible points; an example ends at its first misclassified point.

    Linf and L2: the step is 2 eps at first. At each checkpoint it is halved, and the climb goes on from the best point
    so far, where the loss rose in at most 75 % of the steps since the last checkpoint, or where neither the best loss
    grew nor the step was halved since then. The first rise is measured from the start, as in the paper. After a return
    to the best point the momentum still refers to the point before the return, as in the authors' code.

    L1: see `_SparseClimber`.

    Args:
        warm: L1 only: whether the start comes from an earlier run, whose sparsity it then inherits.
        ends: whether a misclassified point ends an example; otherwise the point with the largest loss is kept.

    Returns:
        points and scores [B] as `ascent.ascend` does: the loss, infinite where fooled.
    """
    climber = _Climber.begin(model, loss, task, start, precision, samples, ends)
    sparse = isinstance(task.ball, L1Ball)
    state: _Climber | _SparseClimber = _SparseClimber.begin(climber, warm) if sparse else climber
    marks = sparse_checkpoints(steps) if sparse else checkpoints(steps)
    results = Survivors(task)
    rows = torch.arange(len(task.x), device=task.x.device)
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
        state.look(model, loss, precision, samples if step < steps else 0)
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
    ends: bool

    @classmethod
    def begin(
        cls,
        model: Model,
        loss: Loss,
        task: Task,
        start: Tensor,
        precision: Precision,
        samples: int = 1,
        ends: bool = True,
    ) -> _Climber:
        gradient, value, logits = differentiate(model, loss, start, task.labels, precision, samples)
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
            fooled=misclassified(logits, task.labels[0]) & ends,
            ends=ends,
        )

    def select(self, rows: Tensor) -> _Climber:
        tensors: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, task=self.task.select(rows), region=self.region.select(rows), **tensors)

    def scores(self) -> Tensor:
        return self.best_value.masked_fill(self.fooled, math.inf)

    def move(self, first: bool) -> None:
        """One step along the gradient, blended with the last move; both projected."""
        weight = 1.0 if first else MOMENTUM
        target = self.region.project_(self.point + self.task.ball.steepest(self.gradient, self.step, at=self.point))
        # point + weight * (target - point) + (1 - weight) * (point - before)
        blend = target.sub_(self.point).mul_(weight).add_(self.point)
        blend.add_((self.point - self.before).mul_(1 - weight))
        self.before, self.point = self.point, self.region.project_(blend)

    def look(self, model: Model, loss: Loss, precision: Precision, samples: int) -> None:
        """Loss, prediction and gradient (for no samples: none) at the new point; the best point follows."""
        if samples:
            self.gradient, value, logits = differentiate(model, loss, self.point, self.task.labels, precision, samples)
        else:
            value, logits = measure(model, loss, self.point, self.task.labels, precision)
        self.rises = self.rises + (value > self.value)
        self.value = value
        fooled = misclassified(logits, self.task.labels[0]) & self.ends
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
        self.go_back(self.halved)

    def go_back(self, rows: Tensor) -> None:
        """Go on from the best point on these rows, bool [B]."""
        self.point = _where(rows, self.best_point, self.point)
        self.gradient = _where(rows, self.best_gradient, self.gradient)


@dataclass
class _SparseClimber:
    """State of Auto-PGD for L1, around that of the other norms, whose step and counters it does not use.

    A step moves the pixels with the largest gradients by equal amounts, without momentum, and the result is projected.
    At each checkpoint the number of pixels in a step follows the number that the best point has moved, divided by 1.5.
    Where that number fell by more than 5 % the step goes back to eps and the climb to the best point; elsewhere the
    step is divided by 1.5, down to eps / 10.

    Source: Croce and Hein, "Mind the box" (2021), algorithm 1, with the constants of the authors' code.
    """

    climber: _Climber
    step: Tensor  # length of the step, pixel units, [B]
    moved: Tensor  # pixels that the best point had moved at the last checkpoint, [B]
    share: Tensor  # share of the pixels that a step moves, [B]

    FIRST_SHARE: ClassVar[float] = 0.2
    SHRINK: ClassVar[float] = 1.5
    SHORTEST: ClassVar[float] = 0.1
    SPARSER: ClassVar[float] = 0.95

    @classmethod
    def begin(cls, climber: _Climber, warm: bool) -> _SparseClimber:
        eps, pixels = climber.task.ball.eps_of(climber.task.x).view(-1), climber.point[0:1].numel()
        if not warm:
            return cls(climber, eps, torch.full_like(eps, pixels), torch.full_like(eps, cls.FIRST_SHARE))
        moved = _moved_pixels(climber.point, climber.task.x)
        return cls(climber, eps, moved, moved / pixels / cls.SHRINK)

    @property
    def fooled(self) -> Tensor:
        return self.climber.fooled

    @property
    def best_point(self) -> Tensor:
        return self.climber.best_point

    def select(self, rows: Tensor) -> _SparseClimber:
        return _SparseClimber(self.climber.select(rows), self.step[rows], self.moved[rows], self.share[rows])

    def scores(self) -> Tensor:
        return self.climber.scores()

    def move(self, first: bool) -> None:
        """One step along the signs of the largest gradients."""
        gradient = self.climber.gradient.flatten(1)
        size = gradient.abs()
        rank = ((1 - self.share) * size.shape[1]).clamp(0, size.shape[1] - 1).long()
        least = size.sort(dim=1).values.gather(1, rank[:, None])
        signs = gradient.sign() * (size >= least)
        move = signs * (self.step[:, None] / signs.abs().sum(1, keepdim=True).clamp(min=1.0))
        self.climber.point = self.climber.region.project_(self.climber.point + move.view_as(self.climber.point))

    def look(self, model: Model, loss: Loss, precision: Precision, samples: int) -> None:
        self.climber.look(model, loss, precision, samples)

    def judge(self, period: int) -> None:
        """Adapt step and sparsity; see the class."""
        task = self.climber.task
        eps, moved = task.ball.eps_of(task.x).view(-1), _moved_pixels(self.climber.best_point, task.x)
        sparser = moved < self.SPARSER * self.moved
        self.share = moved / task.x[0:1].numel() / self.SHRINK
        self.step = torch.where(sparser, eps, (self.step / self.SHRINK).clamp(min=self.SHORTEST * eps))
        self.moved = moved
        self.climber.go_back(sparser)


def sparse_checkpoints(steps: int) -> list[int]:
    """Numbers of iterations after which an L1 run adapts: every 4 % of them."""
    return list(range(max(int(0.04 * steps), 1), steps + 1, max(int(0.04 * steps), 1)))


def _moved_pixels(point: Tensor, x: Tensor) -> Tensor:
    return (point != x).flatten(1).sum(1).to(x)


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view((-1,) + (1,) * (yes.dim() - 1)), yes, no)
