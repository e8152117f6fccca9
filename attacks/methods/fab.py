"""FAB: fast adaptive boundary attack, along the boundary towards the clean point."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attacks.ascent import WORTH_DROPPING, Survivors, Task
from attacks.attack import ATTACKS, Noise, noise_of
from attacks.auto_pgd import start_on_border
from attacks.gradient import Precision, forward, prepared
from attacks.hyperplane import onto_hyperplane
from attacks.losses import misclassified, strongest_targets
from attacks.mode import Mode, Model, attack_mode
from attacks.nearest import Boundary, Nearest, nearest_boundary, target_boundary
from attacks.noise import Generators
from attacks.threat import Ball

# Keeps the quotient of two distances finite where both are zero; the value of the authors' code.
TINY = 1e-8


@ATTACKS.register("fab")
@dataclass(frozen=True)
class FAB:
    """Fast adaptive boundary attack, FAB, and with `targets` FAB-T.

    Needs: gradients in the input; without `targets` of every class at every step, which is costly beyond some ten
    classes. Returns: a misclassified point inside the ball where one was found, else the nearest one found, moved to
    the ball's border. The gradient's scale plays no part. Neither sound nor complete.

    Args:
        targets: 0 to go for the boundary that is nearest at each iterate; otherwise the number of target classes tried
            one after the other, those with the largest logits at the clean point first (FAB-T; 9 in AutoAttack). Any
            misclassification counts, and each target sees what those before it left.
        steps, restarts: length and number of the runs; the first starts at the clean point, the others at a distance of
            eps/2 from it.
        overshoot: how far past the linearised boundary a step goes (the paper's eta).
        backward: share of the distance that is kept when a misclassified point steps back (beta).
        max_bias: largest weight of the clean point in a step (alpha_max).
        mode, precision, seed: see PGD.

    Source: Croce and Hein (2020), "Minimally distorted adversarial examples", algorithm 1, without its final search.
    """

    targets: int = 0
    steps: int = 100
    restarts: int = 1
    overshoot: float = 1.05
    backward: float = 0.9
    max_bias: float = 0.1
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        if self.targets < 0 or self.steps < 1 or self.restarts < 1:
            raise ValueError(f"expected targets >= 0, steps >= 1 and restarts >= 1, got {self}")

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
        return self._search(model, x, y, ball, noise, stop=True).inside(x, ball)

    @torch.no_grad()
    def nearest(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> Nearest:
        """Nearest misclassified points, however far; the ball gives norm, pixel range and the size of restarts."""
        return self._search(model, x, y, ball, noise_of(self.seed, x, generator, index), stop=False)

    def _search(self, model: Model, x: Tensor, y: Tensor, ball: Ball, noise: Noise, stop: bool) -> Nearest:
        path = Path(self.steps, self.overshoot, self.backward, self.max_bias, self.precision, stop)
        with attack_mode(model, self.mode):
            model, clean = prepared(model, self.mode, x, self.precision)
            fooled = misclassified(clean, y)
            survivors = Survivors(Task(x, (y,), ball), fooled)
            targets = strongest_targets(clean, y, self.targets) if self.targets else None
            for rank in range(1 if targets is None else targets.shape[1]):
                for restart in range(self.restarts):
                    rows = survivors.left()
                    if not len(rows):
                        return _found(survivors, fooled)
                    task = survivors.task.select(rows)
                    start = _start(task, restart, noise(rows, restart, rank))
                    if targets is None:
                        survivors.add(*path.follow(model, nearest_boundary, task, start), rows)
                    else:
                        task = replace(task, labels=(task.labels[0], targets[rows, rank]))
                        survivors.add(*path.follow(model, target_boundary, task, start), rows)
            return _found(survivors, fooled)


@dataclass(frozen=True)
class Path:
    """Hyper-parameters of one run, see FAB.

    Args:
        stop: whether an example ends once it has a misclassified point inside its ball.
    """

    steps: int
    overshoot: float
    backward: float
    max_bias: float
    precision: Precision
    stop: bool

    def follow(self, model: Model, boundary: Boundary, task: Task, start: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest misclassified points of one run and their scores: less the distance; infinite if stopped inside."""
        results = Survivors(task)
        rows = torch.arange(len(task.x), device=task.x.device)
        point, nearest = start, task.x.clone()
        distance = task.x.new_full((len(task.x),), math.inf, dtype=torch.float64)
        radius = task.ball.eps_of(task.x).flatten().double()
        for _ in range(self.steps):
            point = self._step(model, boundary, task, point)
            with torch.no_grad():
                fooled = misclassified(forward(model, point, self.precision), task.labels[0])
            length = task.ball.length(point - task.x)
            # What is inside stays as it is: how long it waits to be dropped depends on the examples beside it.
            closer = fooled & (length < distance) & ~((distance <= radius) & self.stop)
            nearest = _where(closer, point, nearest)
            distance = torch.where(closer, length, distance)
            point = _where(fooled, torch.lerp(task.x, point, self.backward), point)
            done = distance <= radius
            if self.stop and int(done.sum()) > WORTH_DROPPING * len(done):
                results.add(nearest, self._scores(distance, radius, nearest), rows)
                left = (~done).nonzero().squeeze(1)
                rows, task, point, nearest = rows[left], task.select(left), point[left], nearest[left]
                distance, radius = distance[left], radius[left]
                if not len(rows):
                    break
        results.add(nearest, self._scores(distance, radius, nearest), rows)
        return results.points, results.scores

    def _step(self, model: Model, boundary: Boundary, task: Task, point: Tensor) -> Tensor:
        """The next iterate: past the linearised boundary, drawn towards the clean point's projection on it."""
        x, ball = task.x, task.ball
        value, slope = boundary(model, point, task.labels, ball, self.precision)
        value_at_x = value + (slope * (x - point)).flatten(1).sum(1)
        both = torch.cat([point, x]), torch.cat([slope, slope]), torch.cat([value, value_at_x])
        from_point, from_x = onto_hyperplane(ball, *both).chunk(2)
        near, far = (ball.length(move).clamp(min=TINY) for move in (from_point, from_x))
        bias = (near / (near + far)).clamp(max=self.max_bias).to(x.dtype).view((-1,) + (1,) * (x.dim() - 1))
        return ball.cut(torch.lerp(point + self.overshoot * from_point, x + self.overshoot * from_x, bias))

    def _scores(self, distance: Tensor, radius: Tensor, like: Tensor) -> Tensor:
        return (-distance).to(like).masked_fill((distance <= radius) & self.stop, math.inf)


def _start(task: Task, restart: int, generators: Generators) -> Tensor:
    """The clean points at first, then random ones at a distance of eps/2."""
    return start_on_border(task.x, task.ball.scaled(0.5), generators) if restart else task.x.clone()


def _found(survivors: Survivors, fooled: Tensor) -> Nearest:
    """What a search over several runs found; `fooled` are the examples that needed none."""
    x, ball = survivors.task.x, survivors.task.ball
    distances = ball.length(survivors.points - x)
    unfound = survivors.scores == -math.inf
    return Nearest(survivors.points, distances.masked_fill(unfound & ~fooled, math.inf))


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view((-1,) + (1,) * (yes.dim() - 1)), yes, no)
