"""Projected gradient ascent: the one loop behind FGSM, PGD, momentum and margin attacks, and the attacks of training.

Shapes: B examples, K classes; x and points [B, ...], labels a tuple of tensors [B, ...] that starts with the true
classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.gradient import Precision, differentiate, measure
from attacks.losses import Loss, misclassified
from attacks.mode import Model
from attacks.region import Region, Unit, region_around
from attacks.threat import Ball

Keep = Literal["first_fooled", "fooled", "best", "last"]
"""Which point of its path an example returns.

first_fooled: the first misclassified one, else the one with the largest loss; the example stops there.
fooled: the latest misclassified one, else the one with the largest loss (ties: later).
best: the one with the largest loss (ties: later).  last: the last; its loss is never computed.
"""

# Gathering the examples that are left costs less than the passes it saves once this share of them is done.
WORTH_DROPPING = 0.2


@dataclass(frozen=True)
class Task:
    """The examples to attack.

    Args:
        x: clean inputs. labels: true classes y [B], then what else the loss takes (targets, reference logits).
        ball: threat model around x.
        owner: where several rows attack the same example (one per target), the number of that example, [B]; the first
            row that succeeds ends them all.
        pace: factor on the steps of each example, [B]; None for none.
    """

    x: Tensor
    labels: tuple[Tensor, ...]
    ball: Ball
    owner: Tensor | None = None
    pace: Tensor | None = None

    def __post_init__(self) -> None:
        self.ball.require_radii(self.x)

    def select(self, rows: Tensor) -> Task:
        labels = tuple(label[rows] for label in self.labels)
        owner, pace = (None if part is None else part[rows] for part in (self.owner, self.pace))
        return Task(self.x[rows], labels, self.ball.select(rows), owner, pace)


@dataclass(frozen=True)
class Ascent:
    """How to climb.

    Args:
        steps: number of gradients. step_size: length of the first step, in `unit`.
        decay, decay_at: the step is multiplied by `decay` from each of these steps on: a number below 1 is a fraction
            of `steps` (0.5 of 8 steps is step 4, counted from 0), any other the index of a step.
        unit: "eps", or "box" for half the width that each pixel has after the cut by the pixel range.
        keep: which point is returned, see Keep.
        momentum: weight of the former directions, each gradient scaled to L1 length 1; None for plain gradients.
        precision: arithmetic of the model.
    """

    steps: int
    step_size: float
    decay: float = 1.0
    decay_at: tuple[float, ...] = ()
    unit: Unit = "eps"
    keep: Keep = "first_fooled"
    momentum: float | None = None
    precision: Precision = "float32"

    def lengths(self) -> list[float]:
        """Length of every step, in units."""
        turns = [math.ceil(at * self.steps) if at < 1 else at for at in self.decay_at]
        return [self.step_size * self.decay ** sum(step >= turn for turn in turns) for step in range(self.steps)]


def ascend(
    model: Model, loss: Loss, task: Task, start: Tensor, plan: Ascent, region: Region | None = None
) -> tuple[Tensor, Tensor]:
    """Climb the loss from `start` inside the ball.

    One forward and one backward pass per step, and one more forward pass unless plan.keep is "last". Only
    "first_fooled" waits for the device (once per step), to shrink the batch to the examples that still hold out.

    Args:
        start: feasible points; overwritten.
        region: region_around the examples in plan.unit, where the caller has it already.

    Returns:
        points, and their scores [B] for comparing runs: the loss, or infinity for a point that was kept because it is
        misclassified. With keep "last" they are unknown: nan.
    """
    region = region or region_around(task.x, task.ball, plan.unit)
    track = None if plan.keep == "last" else _Track(plan.keep)
    point, velocity = start, None
    for length in plan.lengths():
        gradient, values, logits = differentiate(model, loss, point, task.labels, plan.precision)
        if track is not None:
            track.note(point, values, misclassified(logits, task.labels[0]))
            rows = track.rows_left(task.owner)
            if rows is not None:
                track.leave(rows)
                task, region, point, gradient = task.select(rows), region.select(rows), point[rows], gradient[rows]
                velocity = None if velocity is None else velocity[rows]
                if not len(rows):
                    return track.result()
        if plan.momentum is not None:
            gradient = velocity = _accumulate(velocity, gradient, plan.momentum)
        region.climb_(point, gradient, length)
    if track is None:
        return point, point.new_full((len(point),), math.nan)
    values, logits = measure(model, loss, point, task.labels, plan.precision)
    track.note(point, values, misclassified(logits, task.labels[0]))
    return track.result()


def _accumulate(velocity: Tensor | None, gradient: Tensor, momentum: float) -> Tensor:
    # A gradient that is exactly zero must not turn the sum into nan, which would freeze the example for good.
    length = gradient.flatten(1).abs().sum(1).clamp_(min=torch.finfo(gradient.dtype).tiny)
    scaled = gradient / length.view((-1,) + (1,) * (gradient.dim() - 1))
    return scaled if velocity is None else velocity.mul_(momentum).add_(scaled)


class _Track:
    """The point that each example keeps; examples that are done leave, and come back in the result."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self._index: Tensor | None = None

    def note(self, point: Tensor, values: Tensor, fooled: Tensor) -> None:
        """Compare the points with the kept ones; `values` [B] are their losses."""
        scores = values if self.keep == "best" else values.masked_fill(fooled, math.inf)
        if not hasattr(self, "points"):
            self.points = point.clone()
            self.scores = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            return
        better = scores >= self.scores
        if self.keep == "first_fooled":
            better &= self.scores < math.inf
        torch.where(better.view((-1,) + (1,) * (point.dim() - 1)), point, self.points, out=self.points)
        torch.where(better, scores, self.scores, out=self.scores)

    def rows_left(self, owner: Tensor | None) -> Tensor | None:
        """Rows that still hold out, or None where dropping the others is not worth while."""
        if self.keep != "first_fooled":
            return None
        done = self.scores == math.inf
        if owner is not None:
            done = torch.isin(owner, owner[done])
        if int(done.sum()) <= WORTH_DROPPING * len(done):
            return None
        return (~done).nonzero().squeeze(1)

    def leave(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        if self._index is None:
            self._all_points, self._all_scores = self.points, self.scores
            self._index = rows
        else:
            self._write_back()
            self._index = self._index[rows]
        self.points, self.scores = self.points[rows], self.scores[rows]

    def result(self) -> tuple[Tensor, Tensor]:
        if self._index is None:
            return self.points, self.scores
        self._write_back()
        return self._all_points, self._all_scores

    def _write_back(self) -> None:
        assert self._index is not None
        self._all_points[self._index] = self.points
        self._all_scores[self._index] = self.scores


def stronger(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Per example, the (points, scores) with the larger score; ties go to the second."""
    better = second[1] >= first[1]
    points = torch.where(better.view((-1,) + (1,) * (first[0].dim() - 1)), second[0], first[0])
    return points, torch.where(better, second[1], first[1])


class Survivors:
    """The strongest point of each example over several runs; later runs see only the examples that hold out.

    A run never takes back what an earlier one achieved: with more runs the set of fooled examples can only grow.

    Args:
        task: all examples. fooled: bool [B], examples that need no attack and keep their clean input; None for none.
    """

    def __init__(self, task: Task, fooled: Tensor | None = None) -> None:
        self.task = task
        self.points = task.x.clone()
        self.scores = task.x.new_full((len(task.x),), -math.inf)
        if fooled is not None:
            self.scores.masked_fill_(fooled, math.inf)

    def left(self) -> Tensor:
        """Rows that hold out (waits for the device)."""
        return (self.scores < math.inf).nonzero().squeeze(1)

    def add(self, points: Tensor, scores: Tensor, rows: Tensor) -> None:
        """Take over the points of a run on `rows` where they are at least as strong."""
        better = scores >= self.scores[rows]
        self.points[rows[better]] = points[better]
        self.scores[rows[better]] = scores[better]
