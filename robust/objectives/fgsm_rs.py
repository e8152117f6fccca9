"""FGSM adversarial training from a random start ("fast")."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.fgsm import FGSM
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("fgsm_rs")
@dataclass(frozen=True)
class FGSMRandomStart:
    """Cross-entropy at the end of one step of 1.25 eps from a random point of the ball (Wong et al. 2020).

    The start is uniform in the part of the ball that lies in the pixel range; the authors draw in the whole ball and
    clip, which differs at pixels within eps of black or white.

    Args:
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    attack: Attack = method_field(ATTACKS, FGSM(step_size=1.25, start="uniform", mode="keep"))
    statistics: BatchNormStatistics = "train"
    batch_norm: BatchNormOf = "own"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        return {"adversarial": cross_entropy(adversarial_logits(views, x_adv, self.batch_norm), views.y)}
