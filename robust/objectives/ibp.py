"""Interval bound propagation, as first published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults, certified_cross_entropy, mixed
from robust.views import Views


@OBJECTIVES.register("ibp")
@dataclass(frozen=True)
class IBP:
    """kappa CE(clean) + (1 - kappa) CE(interval bounds), kappa falling from 1 along the radius ramp.

    Source: Gowal et al. 2018, eq. 13 and section 4.

    Args:
        clean_weight: kappa at the end of the ramp.
    """

    clean_weight: float = 0.5

    defaults: ClassVar[RunDefaults] = CERTIFIED

    def __call__(self, views: Views) -> dict[str, Tensor]:
        kappa = 1 - (1 - self.clean_weight) * views.ramp
        margins = views.margins_beside_clean() if kappa > 0 else views.margins(views.box)
        bounds = certified_cross_entropy(margins, views.y)
        return mixed(views, 1 - kappa, {"ibp": bounds})
