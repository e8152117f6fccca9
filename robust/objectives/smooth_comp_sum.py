"""Smooth adversarial comp-sum losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import logit_differences_moved
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("smooth_comp_sum")
@dataclass(frozen=True)
class SmoothCompSum:
    """Phi_tau(sum_{k != y} exp((z_k - z_y) / rho)) at x + w |D(x_adv) - D(x)|, D the differences z_y - z_k
    (Mao et al. 2023); unreproduced, from memory.

    Phi_tau(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau). The attack climbs the Euclidean length in the second term.
    Passes in training mode: x, then x_adv.

    Args:
        tau: 1 is the cross-entropy, 0 the sum of exponentials, 2 the mean absolute error, between 1 and 2 the
            generalised cross-entropy.
        rho: width of the margins. smooth_weight: w (nu in the paper).
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    tau: float = 1.0
    rho: float = 1.0
    smooth_weight: float = 1.0
    attack: Attack = method_field(
        ATTACKS,
        PGD(steps=10, step_size=0.25, loss="logit_differences", start="gaussian", keep="last", mode="keep"),
    )
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def __post_init__(self) -> None:
        if self.tau < 0 or self.rho <= 0:
            raise ValueError(f"expected tau >= 0 and rho > 0, got {self}")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        clean = views.clean
        logits = adversarial_logits(views, x_adv, self.batch_norm)
        return {
            "clean": comp_sum(clean / self.rho, views.y, self.tau),
            "smooth": self.smooth_weight * logit_differences_moved(logits, views.y, clean),
        }


def comp_sum(logits: Tensor, y: Tensor, tau: float) -> Tensor:
    """Phi_tau(sum over k != y of exp(z_k - z_y)), `[B]`: 1 + u is the exponential of the cross-entropy."""
    loss = cross_entropy(logits, y)
    return loss if tau == 1 else torch.expm1((1 - tau) * loss) / (1 - tau)
