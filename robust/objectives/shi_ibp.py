"""Fast certified training with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults, certified_cross_entropy, mixed
from robust.views import Views


@OBJECTIVES.register("shi_ibp")
@dataclass(frozen=True)
class ShiIBP:
    """Cross-entropy of the interval bounds alone; its warm-up, initialisation and regularisers are settings of the run.

    Use with `init = "ibp"`, the regulariser `shi` and BatchNorm before every ReLU. Source: Shi et al. 2021.

    Args:
        robust_weight: weight of the bound term; below 1 the rest goes to the clean term (CTBench).
    """

    robust_weight: float = 1.0

    defaults: ClassVar[RunDefaults] = CERTIFIED

    def __call__(self, views: Views) -> dict[str, Tensor]:
        margins = views.margins_beside_clean() if self.robust_weight < 1 else views.margins(views.box)
        bounds = certified_cross_entropy(margins, views.y)
        return mixed(views, self.robust_weight, {"ibp": bounds})
