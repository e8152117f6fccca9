"""ELLE and ELLE-A: the loss kept linear between random points of the ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.noise import uniform
from robust.active import Active, Moment, RunFacts
from robust.objective import cross_entropy
from robust.regularizer import REGULARIZERS
from robust.training_attack import BatchNormOf, logits_at
from robust.views import Views


@REGULARIZERS.register("elle")
@dataclass(frozen=True)
class ELLE:
    """weight * mean_i (l(x_c) - (1 - t) l(x_a) - t l(x_b))^2, x_c = (1 - t) x_a + t x_b (Abad Rocamora et al. 2024).

    x_a and x_b are uniform in the box of the radius, not cut to the pixel range, t is uniform in [0, 1], l the
    cross-entropy. One pass in training mode over the three points of every example, no second derivatives. Single-step
    training (`pgd:attack=(fgsm:mode=keep),statistics=train,batch_norm=own`) with it does not overfit
    catastrophically. The authors' loop steps the optimiser twice per batch, so learning rates do not compare.

    Args:
        weight: 1000 up to 8/255 on CIFAR-10, 5000 up to 20/255, 10000 beyond.
        batch_norm: BatchNorm statistics of the pass.
    """

    weight: float = 1000.0
    batch_norm: BatchNormOf = "own"

    needs_boxes: ClassVar[bool] = False

    def __call__(self, views: Views) -> dict[str, Tensor]:
        return {"elle": self.weight * linearity_error(views, self.batch_norm)}


@REGULARIZERS.register("elle_a")
@dataclass(frozen=True)
class ELLEAdaptive:
    """ELLE whose weight jumps to `weight` when the error leaves its usual range, and fades otherwise (same source).

    Behind each step, once there are more than 2 past errors: where this step's is above their mean plus `sensitivity`
    standard deviations the weight of the next step is `weight`, else `fade` times the present one. It starts at 0.

    Args:
        weight: 4000 for every radius. fade, sensitivity: as above.
        batch_norm: BatchNorm statistics of the pass.
    """

    weight: float = 4000.0
    fade: float = 0.99
    sensitivity: float = 2.0
    batch_norm: BatchNormOf = "own"

    def start(self, run: RunFacts) -> Active:
        return _Active(self)


class _Active(Active):
    needs_boxes: ClassVar[bool] = False

    def __init__(self, method: ELLEAdaptive) -> None:
        self.method = method
        self.error: float | None = None
        # Weight, and number, mean and sum of squared deviations of all past errors.
        self.weight, self.count, self.mean, self.squares = 0.0, 0.0, 0.0, 0.0

    def __call__(self, views: Views) -> dict[str, Tensor]:
        error = linearity_error(views, self.method.batch_norm)
        self.error = float(error.detach())
        return {"elle": self.weight * error}

    def after_step(self, moment: Moment) -> None:
        if self.error is None:  # a step of the objective's alone
            return
        method = self.method
        usual = self.mean + method.sensitivity * math.sqrt(self.squares / max(self.count, 1))
        self.weight = method.weight if self.count > 2 and self.error > usual else method.fade * self.weight
        self.count += 1
        change = self.error - self.mean
        self.mean += change / self.count
        self.squares += change * (self.error - self.mean)
        self.error = None

    def state(self) -> dict[str, Tensor]:
        values = [self.weight, self.count, self.mean, self.squares]
        return {"values": torch.tensor(values, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.weight, self.count, self.mean, self.squares = state["values"].tolist()


def linearity_error(views: Views, batch_norm: BatchNormOf) -> Tensor:
    """mean_i (l(x_c) - (1 - t) l(x_a) - t l(x_b))^2, a scalar; the points stay the same within a step.

    Raises:
        ValueError: the ball is not one of the maximum norm.
    """
    if views.ball.norm != "linf":
        raise ValueError(f"elle draws points from a box and needs an linf ball, got {views.ball.norm}")
    x, y = views.x, views.y

    def draw() -> tuple[Tensor, Tensor]:
        eps = views.ball.eps_of(x)
        a, b = (x + eps * (2 * uniform(x.shape, x, views.generator) - 1) for _ in range(2))
        t = uniform((len(x), *[1] * (x.dim() - 1)), x, views.generator)
        return torch.cat([a, b, (1 - t) * a + t * b]), t.flatten()

    points, t = views.once("elle", draw)
    a, b, c = cross_entropy(logits_at(views, points, batch_norm), y.repeat(3)).chunk(3)
    return views.mean((c - (1 - t) * a - t * b).square())
