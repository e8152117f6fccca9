"""FAWA: fairness-aware weight average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.active import Active, Moment, RunFacts
from robust.class_errors import class_errors
from robust.hook import HOOKS


@HOOKS.register("fawa")
@dataclass(frozen=True)
class FAWA:
    """Average over the epochs whose worst class is robust enough on the held-out images (Wei et al. 2023, CFA).

    The average joins the weights behind an epoch, with weight 1 - decay, only where every class has at least
    `threshold` of its images right under attack. It is judged and kept in place of the trained weights, with BatchNorm
    statistics re-estimated.

    Args:
        decay: per epoch. threshold: share of a class.
        attack: on the held-out images.
    """

    decay: float = 0.88
    threshold: float = 0.24
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, keep="last"))

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"fawa: decay={self.decay}: expected a share in [0, 1)")

    def start(self, run: RunFacts) -> Active:
        return _Active(self, run)


class _Active(Active):
    averages = True

    def __init__(self, fawa: FAWA, run: RunFacts) -> None:
        self.fawa, self.run = fawa, run
        self.average: dict[str, Tensor] = {}

    def after_epoch(self, moment: Moment) -> None:
        run = self.run
        errors = class_errors(moment.model, moment.held_out(), self.fawa.attack, run.ball, run.classes)
        if float(1 - errors.attacked.max()) < self.fawa.threshold:
            return
        with torch.no_grad():
            for name, parameter in moment.model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter, 1 - self.fawa.decay)
                else:
                    self.average[name] = parameter.detach().clone()

    def weights(self) -> dict[str, Tensor] | None:
        return self.average or None

    def state(self) -> dict[str, Tensor]:
        return dict(self.average)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.average = {name: tensor.clone() for name, tensor in state.items()}
