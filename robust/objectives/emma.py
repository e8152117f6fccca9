"""EMMA: every wrong class moves up by what an adversary could gain for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.l2_margins import L2Logits, l2_logits
from robust.objective import L2_CERTIFIED, OBJECTIVES, RunDefaults, cross_entropy
from robust.views import Views


@OBJECTIVES.register("emma")
@dataclass(frozen=True)
class EMMA:
    """Cross-entropy over y_i + e_i K ||w_t - w_i||, e_i the radius at which class i draws level with the label t.

    e_i is clipped to [least, 1] times the step's radius and has no gradient: classes within reach are raised to the
    label's logit, those out of reach by all that the adversary has. Needs an l2 ball and an L2Net.
    Source: Hu et al. 2023, section 4; their first code raised every class in full (least=1).

    Args:
        least: share of the radius that is always counted.
        power_iterations: per step, for K.
    """

    least: float = 0.01
    power_iterations: int = 10

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    defaults: ClassVar[RunDefaults] = L2_CERTIFIED

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise ValueError(f"emma: expected 0 <= least <= 1, got least={self.least}")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        found = l2_logits(views, self.power_iterations)
        return {"emma": cross_entropy(raised(found, views.y, self.least), views.y)}


def raised(found: L2Logits, y: Tensor, least: float) -> Tensor:
    """Logits of which the wrong ones are raised, `[B, K]`; the label's stays as it is."""
    reach = found.reach(y)
    with torch.no_grad():
        gap = found.logits.gather(1, y.unsqueeze(1)) - found.logits
        share = (gap / reach.clamp(min=1e-8)).clamp(least, 1)
    return found.logits + share * reach
