"""WEAT: weighted energy adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust.views import Views
from robust.weighting import WEIGHTINGS, Weighting


@WEIGHTINGS.register("weat")
@dataclass(frozen=True)
class WEAT(Weighting):
    """w = 1 / log(1 + exp|E(x)|) on every term, E(x) = -log sum_k exp z_k(x) of the clean logits, detached
    (Mirza et al. 2024).

    WEAT_nat is `trades` with it. WEAT_adv has the cross-entropy at x_adv and kl_weight=7:
    `sovr:percent=0,kl_weight=7,statistics=eval` with TRADES' attack. Nothing is normalised: at |E| = 5 a loss shrinks
    to a fifth, which weakens the learning rate against weight decay.
    """

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        energy = -views.clean.detach().logsumexp(1)
        # log(1 + exp(a)) for a >= 0 without overflow.
        weight = 1 / (energy.abs() + (-energy.abs()).exp().log1p())
        return {name: weight * value for name, value in terms.items()}
