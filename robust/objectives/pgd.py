"""Adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy, mixed
from robust.training_attack import BatchNormStatistics, adversarial
from robust.views import Views


@OBJECTIVES.register("pgd")
@dataclass(frozen=True)
class PGDTraining:
    """Cross-entropy at points that PGD finds (Madry et al. 2018), with the clean batch's BatchNorm statistics.

    Args:
        attack: inner search.
        robust_weight: weight of the adversarial term; the rest goes to the clean one.
        statistics: BatchNorm statistics under the attack.
    """

    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, unit="box", keep="last", mode="keep"))
    robust_weight: float = 1.0
    statistics: BatchNormStatistics = "batch"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        return mixed(views, self.robust_weight, {"adversarial": cross_entropy(views.snapshot(x_adv), views.y)})
