"""GloRo: a bottom logit that wins where the prediction is not certified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.l2_margins import L2Logits, l2_logits
from robust.objective import L2_CERTIFIED, OBJECTIVES, RunDefaults, cross_entropy
from robust.views import Views


@OBJECTIVES.register("gloro")
@dataclass(frozen=True)
class GloRo:
    """Cross-entropy over the logits and y_bot = max over i != j of (y_i + eps K ||w_j - w_i||), j the prediction.

    Needs an l2 ball and an L2Net. Source: Leino et al. 2021, section 3.

    Args:
        power_iterations: per step, for K.
    """

    power_iterations: int = 5

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    defaults: ClassVar[RunDefaults] = L2_CERTIFIED

    def __call__(self, views: Views) -> dict[str, Tensor]:
        return {"gloro": cross_entropy(with_bottom(l2_logits(views, self.power_iterations)), views.y)}


def with_bottom(found: L2Logits) -> Tensor:
    """Logits and y_bot, `[B, K + 1]`."""
    prediction = found.logits.detach().argmax(1)
    rivals = (found.logits + found.reach(prediction)).scatter(1, prediction.unsqueeze(1), -torch.inf)
    return torch.cat([found.logits, rivals.amax(1, keepdim=True)], 1)
