"""Standard training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust.objective import OBJECTIVES, cross_entropy
from robust.views import Views


@OBJECTIVES.register("natural")
@dataclass(frozen=True)
class Natural:
    """Cross-entropy on clean images."""

    def __call__(self, views: Views) -> dict[str, Tensor]:
        return {"clean": cross_entropy(views.clean, views.y)}
