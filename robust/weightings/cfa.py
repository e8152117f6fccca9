"""CFA: class-wise calibrated fair adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.losses import misclassified
from robust.active import Active, Moment, RunFacts
from robust.views import Views
from robust.weighting import WEIGHTINGS, Radius, Weighting, check_class_steps, check_start


@WEIGHTINGS.register("cfa")
@dataclass(frozen=True)
class CFA:
    """Class radii and class weights that follow each class's robust accuracy r_k in the last epoch (Wei et al. 2023).

    The radius of class k is (radius_base + r_k) eps, with steps as they were: easy classes get larger balls, hard ones
    smaller. With `trades:kl_weight=1` the loss becomes (1 - b_k) CE + b_k KL, where b_k = beta_k / (1 + beta_k) and
    beta_k = (weight_base + r_k) kl_weight. r_k is measured on the adversarial batches of training. The third part, fair
    weight averaging, is the hook `fawa`.

    Args:
        radius_base, weight_base: lambda_1 and lambda_2.
        kl_weight: beta; 0 leaves the terms alone, as adversarial training needs it.
        start_epoch: epoch from which classes differ; before it r_k + base counts as 1.
    """

    radius_base: float = 0.5
    weight_base: float = 0.5
    kl_weight: float = 6.0
    start_epoch: int = 10

    def __post_init__(self) -> None:
        if self.start_epoch < 1:
            raise ValueError(f"start_epoch={self.start_epoch}: the first epoch has no robust accuracies before it")

    def start(self, run: RunFacts) -> Active:
        check_start("cfa", self.start_epoch, run)
        check_class_steps("cfa", run)
        weight = getattr(run.objective, "kl_weight", 1)
        if self.kl_weight and weight != 1:
            raise ValueError(
                f"cfa: the term kl gets its weight here, and the objective has kl_weight={weight:g}; set it to 1, "
                "as in trades:kl_weight=1"
            )
        return _Active(self, run.classes)


class _Active(Active, Weighting):
    def __init__(self, cfa: CFA, classes: int) -> None:
        self.cfa = cfa
        self.right, self.counts = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
        self.accuracy = torch.zeros(0, dtype=torch.float64)

    def radius(self, y: Tensor) -> Radius | None:
        if not len(self.accuracy):
            return None
        factor = self.cfa.radius_base + self.accuracy.to(y.device)[y]
        return Radius(factor, torch.ones_like(factor))

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.cfa.kl_weight:
            return terms
        if set(terms) != {"clean", "kl"}:
            raise ValueError(
                f"cfa mixes the terms clean and kl (use trades:kl_weight=1), and the objective has {', '.join(terms)}; "
                "for adversarial training set cfa:kl_weight=0"
            )
        factor = torch.ones_like(views.y, dtype=torch.float64)
        if len(self.accuracy):
            factor = self.cfa.weight_base + self.accuracy.to(views.y.device)[views.y]
        ratio = (factor * self.cfa.kl_weight).to(views.x)
        share = ratio / (1 + ratio)
        return {"clean": (1 - share) * terms["clean"], "kl": share * terms["kl"]}

    def see(self, views: Views, moment: Moment) -> None:
        right = ~misclassified(views.adversarial, views.y).cpu()
        self.right += torch.bincount(views.y.cpu(), right.double(), minlength=len(self.right))
        self.counts += torch.bincount(views.y.cpu(), minlength=len(self.counts))

    def after_epoch(self, moment: Moment) -> None:
        if round(moment.epoch) >= self.cfa.start_epoch:
            self.accuracy = self.right / self.counts.clamp(min=1)
        self.right, self.counts = torch.zeros_like(self.right), torch.zeros_like(self.counts)

    def state(self) -> dict[str, Tensor]:
        return {"right": self.right, "counts": self.counts, "accuracy": self.accuracy}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.right, self.counts, self.accuracy = (state[name].cpu().clone() for name in ("right", "counts", "accuracy"))
