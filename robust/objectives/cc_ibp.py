"""CC-IBP: convex combination of margins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.registry import method_field
from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults, certified_cross_entropy, mixed
from robust.training_attack import (
    EXPRESSIVE_PGD,
    BatchNormStatistics,
    BoundsStatistics,
    adversarial,
    attacked_and_bounding,
)
from robust.views import Views


@OBJECTIVES.register("cc_ibp")
@dataclass(frozen=True)
class CCIBP:
    """Cross-entropy of a m_IBP + (1 - a) m(x_adv): margins are mixed, then one loss (De Palma et al. 2024, eq. 5).

    Args:
        ibp_weight: the coefficient a (alpha in the paper). 0 is adversarial training, 1 is IBP.
        attack: inner search.
        attack_factor: the attack's radius as a multiple of the step's (2.1 for CIFAR-10 at 2/255).
        robust_weight: weight of the term; the rest goes to the clean term.
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
            raise ValueError(f"cc_ibp: ibp_weight={self.ibp_weight}: expected a share in [0, 1]")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, self.attack_factor, self.statistics)
        logits, network = attacked_and_bounding(views, x_adv, self.bounds_statistics)
        attacked = logits.gather(1, views.y.unsqueeze(1)) - logits
        margins = self.ibp_weight * views.margins(views.box, network) + (1 - self.ibp_weight) * attacked
        return mixed(views, self.robust_weight, {"cc_ibp": certified_cross_entropy(margins, views.y)})
