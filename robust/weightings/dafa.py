"""DAFA: distance-aware fair adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.active import Active, Moment, RunFacts
from robust.views import Views
from robust.weighting import WEIGHTINGS, Radius, Weighting, check_class_steps, label_terms, weighted


@WEIGHTINGS.register("dafa")
@dataclass(frozen=True)
class DAFA:
    """Class weights W on the label's loss terms, on the radius and on the attack's steps: weight moves from easier
    classes to the harder ones that are taken for them (Lee et al. 2024).

    During the last epoch of the warm-up, S[i] is the mean prediction at the adversarial points of class i; W follows
    once, from `class_weights`, and stays. Divergences (TRADES' KL) are not weighted. The authors' branch for PGD takes
    two steps per iteration and undoes the class radius; this is the paper's method on any objective.

    Args:
        strength: lambda: 1.0 on CIFAR-10, 1.5 on CIFAR-100 and STL-10.
        warmup_epochs: epochs until the weights act (tau).
        least: smallest weight; the formula can give negative ones.
    """

    strength: float = 1.0
    warmup_epochs: int = 70
    least: float = 0.1

    def start(self, run: RunFacts) -> Active:
        if run.epochs < 2:
            raise ValueError("dafa needs at least 2 epochs: its weights are measured in one and act in those behind it")
        if not 1 <= self.warmup_epochs < run.epochs:
            raise ValueError(
                f"dafa: warmup_epochs={self.warmup_epochs} of {run.epochs} epochs leaves none with weights; give "
                f"1 to {run.epochs - 1}, such as dafa:warmup_epochs={max(1, run.epochs // 2)}"
            )
        check_class_steps("dafa", run)
        return _Active(self, run.classes)


class _Active(Active, Weighting):
    def __init__(self, dafa: DAFA, classes: int) -> None:
        self.dafa = dafa
        self.sums = torch.zeros(classes, classes, dtype=torch.float64)
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.table = torch.zeros(0, dtype=torch.float64)

    def radius(self, y: Tensor) -> Radius | None:
        return Radius(self._of(y), self._of(y)) if len(self.table) else None

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return weighted(terms, self._of(views.y).to(views.x), label_terms(terms)) if len(self.table) else terms

    def _of(self, y: Tensor) -> Tensor:
        return self.table.to(y.device)[y]

    def see(self, views: Views, moment: Moment) -> None:
        if int(moment.epoch) == self.dafa.warmup_epochs - 1:
            predictions = views.adversarial.softmax(1).to("cpu", torch.float64)
            self.sums.index_add_(0, views.y.cpu(), predictions)
            self.counts += torch.bincount(views.y.cpu(), minlength=len(self.counts))

    def after_epoch(self, moment: Moment) -> None:
        if round(moment.epoch) == self.dafa.warmup_epochs:
            similarity = self.sums / self.counts.clamp(min=1)[:, None]
            self.table = class_weights(similarity, self.dafa.strength).clamp(min=self.dafa.least)

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "counts": self.counts, "table": self.table}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sums, self.counts, self.table = (state[name].cpu().clone() for name in ("sums", "counts", "table"))


def class_weights(similarity: Tensor, strength: float) -> Tensor:
    """W `[K]` from the mean predictions S `[K, K]` of the classes.

    W_i = 1 + strength * sum over j != i of S[i, j] S[j, j] where S[i, i] < S[j, j], of -S[j, i] S[i, i] otherwise. What
    one class gains from a pair the other loses, so that W sums to K unless two diagonal entries are equal.
    """
    own = similarity.diagonal()
    gain = similarity * own[None, :]  # [i, j]: S[i, j] S[j, j]
    change = torch.where(own[:, None] < own[None, :], gain, -gain.T)
    return 1 + strength * (change.sum(1) - change.diagonal())
