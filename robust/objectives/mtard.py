"""MTARD and B-MTARD: distillation from a robust and a clean teacher, kept in balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.active import Active, Moment, RunFacts
from robust.auxiliary import FrozenModel
from robust.objective import OBJECTIVES
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("mtard")
@dataclass(frozen=True)
class MTARD:
    """a KL(robust teacher(x_adv) || p(x_adv)) + b KL(clean teacher(x) || p(x)), each over K (Zhao et al. 2022, 2024).

    No term sees the label. a + b = 1 follow the losses: with r each loss over its value at the first step, b moves to
    r_b / (r_a + r_b) by the rate. B-MTARD, the journal's form, is temperature_rate=0.001: it also tempers the teachers,
    by 1 to `hottest`, so that their entropies meet. Passes in training mode: x_adv, then x.

    Args:
        robust_teacher, clean_teacher: checkpoints.
        rate: of the weights. temperature_rate: of the temperatures, 0 for none.
        hottest: largest temperature.
        slower_at: epochs from which both rates are a tenth, as the learning rate is; of 300.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    robust_teacher: str
    clean_teacher: str
    rate: float = 0.025
    temperature_rate: float = 0.0
    hottest: float = 10.0
    slower_at: tuple[float, ...] = (215.0, 260.0, 285.0)
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, start="gaussian", keep="last", mode="keep"))
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def start(self, run: RunFacts) -> Active:
        return _Active(self, FrozenModel(self.robust_teacher, run), FrozenModel(self.clean_teacher, run))

    def rate_factor(self, epoch: float) -> float:
        """Factor on both rates."""
        return 0.1 ** sum(epoch >= turn for turn in self.slower_at)


class _Active(Active):
    """Pairs are (robust, clean) throughout."""

    def __init__(self, mtard: MTARD, robust: FrozenModel, clean: FrozenModel) -> None:
        self.mtard, self.robust, self.clean = mtard, robust, clean
        self.first = torch.full((2,), torch.nan, dtype=torch.float64)
        self.shares = torch.full((2,), 0.5, dtype=torch.float64)
        self.temperatures = torch.ones(2, dtype=torch.float64)
        self.next: tuple[Tensor, Tensor, Tensor] | None = None

    def companions(self) -> list[Active]:
        return [self.robust, self.clean]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        mtard = self.mtard
        x_adv = adversarial(views, mtard.attack, statistics=mtard.statistics)
        students = (adversarial_logits(views, x_adv, mtard.batch_norm), views.clean)
        taught = views.once("teachers", lambda: (self.robust(x_adv), self.clean(views.x)))
        targets = [t.detach() / float(heat) for t, heat in zip(taught, self.temperatures, strict=True)]
        losses = [mean_divergence(target, student) for target, student in zip(targets, students, strict=True)]
        means = [views.mean(loss.detach()) for loss in losses]
        entropies = [views.mean(_entropy(target)) for target in targets]
        self._balance(means, entropies, mtard.rate_factor(views.epoch))
        assert self.next is not None
        robust, clean = (float(weight) * loss for weight, loss in zip(self.next[1], losses, strict=True))
        return {"distillation": robust, "clean_distillation": clean}

    def _balance(self, losses: list[Tensor], entropies: list[Tensor], factor: float) -> None:
        """The state behind this step; a step whose loss is computed again starts from the same one."""
        means = torch.stack(losses).cpu().double()
        first = torch.where(self.first.isnan(), means, self.first)
        rates = means / first
        weights = self.shares + factor * self.mtard.rate * (rates / rates.sum() - self.shares)
        entropy = torch.stack(entropies).cpu().double()
        step = factor * self.mtard.temperature_rate * torch.sign(entropy / entropy.flip(0) - 1)
        self.next = first, weights, (self.temperatures - step).clamp(1.0, self.mtard.hottest)

    def after_step(self, moment: Moment) -> None:
        if self.next is not None:
            self.first, self.shares, self.temperatures = self.next
            self.next = None

    def state(self) -> dict[str, Tensor]:
        return {"first": self.first, "weights": self.shares, "temperatures": self.temperatures}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.first, self.shares, self.temperatures = (
            state[name].cpu().clone() for name in ("first", "weights", "temperatures")
        )


def mean_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) / K, `[B]`."""
    log_target = target.log_softmax(1)
    return (log_target.exp() * (log_target - logits.log_softmax(1))).mean(1)


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)
