"""Class weights for classes of unequal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.active import Active, Moment, RunFacts
from robust.views import Views
from robust.weighting import WEIGHTINGS, Weighting, check_start, label_terms, weighted


@WEIGHTINGS.register("effective_number")
@dataclass(frozen=True)
class EffectiveNumber:
    """w_k = (1 - b) / (1 - b^{n_k}) for a class of n_k training images, scaled to sum K, on the label's terms
    (Cui et al. 2019).

    Deferred: rare classes gain weight only when features are learnt. SRAT's weights are these.

    Args:
        beta: b; 0 leaves all classes equal, and towards 1 the weights go to 1 / n_k.
        start_epoch: from which the weights act, at least 1.
    """

    beta: float = 0.9999
    start_epoch: int = 160

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1 or self.start_epoch < 1:
            raise ValueError(f"expected 0 <= beta < 1 and start_epoch >= 1, got {self}")

    def start(self, run: RunFacts) -> Active:
        check_start("effective_number", self.start_epoch, run)
        return _Active(self, run.classes)


class _Active(Active, Weighting):
    def __init__(self, method: EffectiveNumber, classes: int) -> None:
        self.method, self.classes = method, classes
        self.table = torch.zeros(0, dtype=torch.float64)

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if not len(self.table):
            return terms
        return weighted(terms, self.table.to(views.x)[views.y], label_terms(terms))

    def after_epoch(self, moment: Moment) -> None:
        if round(moment.epoch) == self.method.start_epoch:
            counts = sum(torch.bincount(y.cpu(), minlength=self.classes) for _, y in moment.labelled())
            self.table = effective_weights(torch.as_tensor(counts), self.method.beta)

    def state(self) -> dict[str, Tensor]:
        return {"table": self.table}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.table = state["table"].cpu().clone()


def effective_weights(counts: Tensor, beta: float) -> Tensor:
    """(1 - b) / (1 - b^n) per class, scaled to sum K, float64; a class without images counts as one with a single."""
    weight = (1 - beta) / (1 - beta ** counts.clamp(min=1).double())
    return weight * (len(counts) / weight.sum())
