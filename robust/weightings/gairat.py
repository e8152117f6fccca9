"""GAIRAT: geometry-aware instance-reweighted adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.active import RunFacts
from robust.views import Views
from robust.weighting import WEIGHTINGS, Weighting, check_start, normalised, weighted_term


@WEIGHTINGS.register("gairat")
@dataclass(frozen=True)
class GAIRAT(Weighting):
    """w = (1 + tanh(shift + 5 (1 - 2 kappa / K))) / 2, scaled to mean 1 over the batch (Zhang et al. 2021).

    kappa counts the points of the attack's path, K long, that are still classified correctly: examples that fall early
    weigh more. Their robustness under AutoAttack is far below that under PGD.

    Args:
        shift: Lambda in the paper.
        start_epoch: epoch from which the weights act; 60 of 120 in the paper.
        term: of the objective, that is weighted.
    """

    shift: float = -1.0
    start_epoch: float = 60.0
    term: str = "adversarial"

    needs_kappa: ClassVar[bool] = True

    def start(self, run: RunFacts) -> GAIRAT:
        check_start("gairat", self.start_epoch, run)
        return self

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if views.epoch < self.start_epoch:
            return terms
        distance = views.kappa.to(views.x) / max(views.path_length, 1)
        weight = (1 + torch.tanh(self.shift + 5 * (1 - 2 * distance))) / 2
        return weighted_term(terms, normalised(weight, "mean_one"), self.term, "gairat")
