"""The encouraging loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views

LEAST_DOUBT = 1e-5
"""1 - p_y below which the logarithm's bonus no longer grows; the authors' value."""


@OBJECTIVES.register("encouraging")
@dataclass(frozen=True)
class Encouraging:
    """-log p_y + log(1 - p_y) at points that PGD finds: a bonus for well-classified examples (Zhao et al. 2022).

    It masks gradients: the authors' own accuracies rise with the attack's radius. Judge it by AutoAttack, never by PGD
    on the cross-entropy.

    Args:
        bonus_end: p_y beyond which the bonus goes on as a straight line, the conservative form; 1 for the plain loss.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    bonus_end: float = 0.75
    attack: Attack = method_field(ATTACKS, PGD(steps=7, step_size=1 / 3, keep="last", mode="keep"))
    statistics: BatchNormStatistics = "train"
    batch_norm: BatchNormOf = "own"

    def __post_init__(self) -> None:
        if not 0 < self.bonus_end <= 1:
            raise ValueError(f"bonus_end={self.bonus_end}: expected a probability above 0, at most 1")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        logits = adversarial_logits(views, x_adv, self.batch_norm)
        return {"adversarial": encouraging_loss(logits, views.y, self.bonus_end)}


def encouraging_loss(logits: Tensor, y: Tensor, bonus_end: float) -> Tensor:
    """-log p + log(max(1 - p, 1e-5)) for p = p_y, `[B]`; beyond p = bonus_end the logarithm is its tangent there."""
    loss = cross_entropy(logits, y)
    p = (-loss).exp()
    bonus = torch.log((1 - p).clamp(min=LEAST_DOUBT))
    if bonus_end < 1:
        line = torch.log(1 - torch.as_tensor(bonus_end).to(p)) - (p - bonus_end) / (1 - bonus_end)
        bonus = torch.where(p > bonus_end, line, bonus)
    return loss + bonus
