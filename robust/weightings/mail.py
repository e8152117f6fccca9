"""MAIL: margin-aware instance reweighting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.losses import margin
from robust.active import RunFacts
from robust.views import Views
from robust.weighting import WEIGHTINGS, Weighting, check_start, weighted_term


@WEIGHTINGS.register("mail")
@dataclass(frozen=True)
class MAIL(Weighting):
    """w = 3 sigmoid(slope (m + bias)), m = max_{k != y} p_k(x_adv) - p_y(x_adv), detached (Liu et al. 2021).

    The weights are not normalised, as in the authors' code. The default is MAIL-AT, on the cross-entropy of `pgd`;
    MAIL-TRADES is `mail:slope=2,bias=0,term=kl` on `trades`, and on `mart` the boosted cross-entropy is weighted.

    Args:
        slope, bias: of the sigmoid.
        scale: the factor 3.
        start_epoch: epoch from which the weights act.
        term: of the objective, that is weighted.
    """

    slope: float = 10.0
    bias: float = -0.5
    scale: float = 3.0
    start_epoch: float = 75.0
    term: str = "adversarial"

    def start(self, run: RunFacts) -> MAIL:
        check_start("mail", self.start_epoch, run)
        return self

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if views.epoch < self.start_epoch:
            return terms
        behind = margin(views.adversarial.detach().softmax(1), views.y)
        return weighted_term(terms, self.scale * torch.sigmoid(self.slope * (behind + self.bias)), self.term, "mail")
