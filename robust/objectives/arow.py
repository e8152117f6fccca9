"""ARoW: anti-robust weighted regularisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import kl_to_reference
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("arow")
@dataclass(frozen=True)
class ARoW:
    """Label-smoothed CE(z(x), y) + w KL(p(x) || p(x_adv)) (1 - p_y(x_adv)) (Yang et al. 2023).

    As MART, but the data term is clean and the weight is read off the adversarial prediction; it is trained, not
    detached. Passes in training mode: x, then x_adv. On CIFAR-100 the authors attack the cross-entropy.

    Args:
        kl_weight: w, the authors' --lamb; the paper's lambda is half of it.
        label_smoothing: share of the label's weight that is spread over all classes.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    kl_weight: float = 7.0
    label_smoothing: float = 0.2
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, loss="kl", keep="last", mode="keep"))
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        clean = views.clean
        logits = adversarial_logits(views, x_adv, self.batch_norm)
        doubt = 1 - logits.softmax(1).gather(1, views.y[:, None]).squeeze(1)
        return {
            "clean": F.cross_entropy(clean, views.y, reduction="none", label_smoothing=self.label_smoothing),
            "kl": self.kl_weight * doubt * kl_to_reference(logits, views.y, clean),
        }
