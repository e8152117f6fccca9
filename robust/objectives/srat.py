"""SRAT: separable reweighted adversarial training, for classes of unequal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, logits_and_features_at
from robust.views import Views


@OBJECTIVES.register("srat")
@dataclass(frozen=True)
class SRAT:
    """CE(z(x_adv), y) + w separability of the last layer's inputs at x_adv (Wang et al. 2021); unreproduced: the
    formulas beyond the abstract are from memory.

    The class weights of the method, and the epoch from which they act, are the weighting `effective_number`.

    Args:
        separation_weight: w. temperature: of the separability, see `supervised_contrast`.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    separation_weight: float = 1.0
    temperature: float = 0.1
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, keep="last", mode="keep"))
    statistics: BatchNormStatistics = "train"
    batch_norm: BatchNormOf = "own"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        logits, features = logits_and_features_at(views, x_adv, self.batch_norm)
        views.logits["adversarial"] = logits
        contrast = supervised_contrast(views.whole(features.flatten(1)), views.whole(views.y), self.temperature)
        separability = self.separation_weight * views.own(contrast)
        return {"adversarial": cross_entropy(logits, views.y), "separability": separability}


def supervised_contrast(features: Tensor, y: Tensor, temperature: float) -> Tensor:
    """-mean over the others p of i's class of log(exp(s_ip) / sum_{a != i} exp(s_ia)), s the cosine over `temperature`,
    `[B]`; 0 for an example alone in its class (Khosla et al. 2020).

    Args:
        features: `[B, n]`.
    """
    unit = F.normalize(features.flatten(1), dim=1)
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    similarity = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    # The diagonal's -inf is no part of any sum below; 0 keeps its product with a zero from being nan.
    share = similarity.log_softmax(1).masked_fill(itself, 0.0)
    same = (y[:, None] == y[None, :]) & ~itself
    return -(share * same).sum(1) / same.sum(1).clamp(min=1)
