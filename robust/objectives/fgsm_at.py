"""FGSM adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.fgsm import FGSM
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("fgsm_at")
@dataclass(frozen=True)
class FGSMTraining:
    """Cross-entropy at the end of one gradient step of length eps from the image (Goodfellow et al. 2015).

    Prone to catastrophic overfitting: add the hook catastrophic_overfitting or the regulariser grad_align.

    Args:
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    attack: Attack = method_field(ATTACKS, FGSM(mode="keep"))
    statistics: BatchNormStatistics = "train"
    batch_norm: BatchNormOf = "own"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        return {"adversarial": cross_entropy(adversarial_logits(views, x_adv, self.batch_norm), views.y)}
