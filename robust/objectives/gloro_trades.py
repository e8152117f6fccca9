"""GloRo with a loss in the manner of TRADES: accuracy and certification as two terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.l2_margins import L2Logits, l2_logits
from robust.objective import L2_CERTIFIED, OBJECTIVES, RunDefaults, cross_entropy
from robust.objectives.gloro import with_bottom
from robust.views import Views


@OBJECTIVES.register("gloro_trades")
@dataclass(frozen=True)
class GloRoTRADES:
    """Cross-entropy + robust_weight * KL([softmax(y), 0] || softmax([y, y_bot])) = CE - robust_weight * log(1 - p_bot).

    Needs an l2 ball and an L2Net. Source: Leino et al. 2021.

    Args:
        robust_weight: lambda; 1.2 to 3 on MNIST and CIFAR-10.
        power_iterations: per step, for K.
    """

    robust_weight: float = 1.5
    power_iterations: int = 5

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    defaults: ClassVar[RunDefaults] = L2_CERTIFIED

    def __call__(self, views: Views) -> dict[str, Tensor]:
        found = l2_logits(views, self.power_iterations)
        return {"clean": cross_entropy(found.logits, views.y), "bottom": self.robust_weight * rejection(found)}


def rejection(found: L2Logits) -> Tensor:
    """-log(1 - p_bot), `[B]`."""
    return torch.logsumexp(with_bottom(found), 1) - torch.logsumexp(found.logits, 1)
