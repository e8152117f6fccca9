"""MART: misclassification-aware adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import kl_to_reference
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import TRADES_STEP, BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("mart")
@dataclass(frozen=True)
class MART:
    """BCE(p(x_adv), y) + w KL(p(x) || p(x_adv)) (1 - p_y(x)) (Wang et al. 2020, eq. 11).

    BCE = -log p_y - log(1 - max_{k != y} p_k). The weight 1 - p_y(x) is not detached: it is trained, as in the authors'
    code, whose offsets (1.0001 and 1.0000001 for 1) are kept. Passes in training mode: x, then x_adv.

    Args:
        kl_weight: w (lambda in the paper): 5 for ResNet-18, 6 for WRN-34-10.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    kl_weight: float = 5.0
    attack: Attack = method_field(
        ATTACKS, PGD(steps=10, step_size=TRADES_STEP, start="gaussian", keep="last", mode="keep")
    )
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        clean = views.clean
        logits = adversarial_logits(views, x_adv, self.batch_norm)
        doubt = 1.0000001 - clean.softmax(1).gather(1, views.y[:, None]).squeeze(1)
        divergence = kl_to_reference(logits, views.y, clean)
        return {
            "adversarial": boosted_cross_entropy(logits, views.y),
            "kl": self.kl_weight * doubt * divergence,
        }


def boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y - log(1.0001 - max over k != y of p_k), `[B]`."""
    wrong = logits.softmax(1).scatter(1, y[:, None], 0.0).amax(1)
    return cross_entropy(logits, y) - torch.log(1.0001 - wrong)
