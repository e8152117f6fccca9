"""Adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy, mixed
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("pgd")
@dataclass(frozen=True)
class PGDTraining:
    """Cross-entropy at points that PGD finds (Madry et al. 2018).

    The default is CTBench's form. That of Madry et al. and Rice et al. 2020 is `statistics=train,batch_norm=own`: no
    clean pass, and every iterate of the attack moves the running statistics.

    Args:
        attack: inner search.
        robust_weight: weight of the adversarial term; the rest goes to the clean one.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial term.
        idle_passes: make the two further passes in training mode of Rice et al.'s and AWP's code, whose logits go to
            restarts and to a log only: x_adv before the loss's pass and x behind it. They move the running statistics.
            (Theirs of x comes behind the optimiser's step.)
    """

    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, unit="box", keep="last", mode="keep"))
    robust_weight: float = 1.0
    statistics: BatchNormStatistics = "batch"
    batch_norm: BatchNormOf = "clean"
    idle_passes: bool = False

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        if self.idle_passes:
            views.pass_idly(x_adv)
        logits = adversarial_logits(views, x_adv, self.batch_norm)
        if self.idle_passes:
            views.pass_idly(views.x)
        return mixed(views, self.robust_weight, {"adversarial": cross_entropy(logits, views.y)})
