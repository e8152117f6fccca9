"""Logit annealing: EMMA whose examples count less once their margin is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robust.l2_margins import l2_logits
from robust.objective import L2_CERTIFIED, OBJECTIVES, RunDefaults
from robust.objectives.emma import raised
from robust.views import Views


@OBJECTIVES.register("logit_annealing")
@dataclass(frozen=True)
class LogitAnnealing:
    """-T (1 - p)^focus log p: p is the label's probability by the logits (EMMA's - offset * onehot) / T.

    T is the temperature. Needs an l2 ball and an L2Net. Source: Lai et al. 2025 (BRONet).

    Args:
        offset, temperature, focus: 2, 0.75 and 5 in the paper.
        least, power_iterations: as in `emma`.
    """

    offset: float = 2.0
    temperature: float = 0.75
    focus: float = 5.0
    least: float = 0.01
    power_iterations: int = 10

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    defaults: ClassVar[RunDefaults] = L2_CERTIFIED

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.least <= 1:
            raise ValueError(f"logit_annealing: expected temperature > 0 and 0 <= least <= 1, got {self}")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        found = l2_logits(views, self.power_iterations)
        return {"annealed": self.annealed(raised(found, views.y, self.least), views.y)}

    def annealed(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits that are raised already, `[B]`."""
        lowered = logits - self.offset * F.one_hot(y, logits.shape[1])
        log_p = F.log_softmax(lowered / self.temperature, 1).gather(1, y.unsqueeze(1)).squeeze(1)
        return -self.temperature * (1 - log_p.exp()) ** self.focus * log_p
