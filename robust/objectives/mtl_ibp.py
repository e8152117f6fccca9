"""MTL-IBP: convex combination of losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.registry import method_field
from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults, certified_cross_entropy, cross_entropy, mixed
from robust.training_attack import (
    EXPRESSIVE_PGD,
    BatchNormStatistics,
    BoundsStatistics,
    adversarial,
    attacked_and_bounding,
)
from robust.views import Views


@OBJECTIVES.register("mtl_ibp")
@dataclass(frozen=True)
class MTLIBP:
    """a CE(interval bounds) + (1 - a) CE(z(x_adv)) (De Palma et al. 2024, eq. 6).

    Args:
        ibp_weight: the coefficient a (alpha in the paper). 0 is adversarial training, 1 is IBP.
        attack: inner search.
        attack_factor: the attack's radius as a multiple of the step's (2.1 for CIFAR-10 at 2/255).
        robust_weight: weight of both terms; the rest goes to the clean term.
        statistics: BatchNorm statistics under the attack.
        bounds_statistics: batch whose BatchNorm statistics bounds and adversarial logits use.
    """

    ibp_weight: float = 0.5
    attack: Attack = method_field(ATTACKS, EXPRESSIVE_PGD)
    attack_factor: float = 1.0
    robust_weight: float = 1.0
    statistics: BatchNormStatistics = "batch"
    bounds_statistics: BoundsStatistics = "clean"

    defaults: ClassVar[RunDefaults] = CERTIFIED

    def __post_init__(self) -> None:
        if not 0 <= self.ibp_weight <= 1:
            raise ValueError(f"mtl_ibp: ibp_weight={self.ibp_weight}: expected a share in [0, 1]")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, self.attack_factor, self.statistics)
        logits, network = attacked_and_bounding(views, x_adv, self.bounds_statistics)
        bounds = certified_cross_entropy(views.margins(views.box, network), views.y)
        attacked = cross_entropy(logits, views.y)
        terms = {"ibp": self.ibp_weight * bounds, "adversarial": (1 - self.ibp_weight) * attacked}
        return mixed(views, self.robust_weight, terms)
