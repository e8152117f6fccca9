"""STAPS: TAPS on SABR's small box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.registry import method_field
from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults
from robust.objectives.sabr import small_box
from robust.objectives.taps import TAPS
from robust.training_attack import SABR_PGD, BatchNormStatistics, adversarial
from robust.views import Views


@OBJECTIVES.register("staps")
@dataclass(frozen=True)
class STAPS:
    """TAPS whose input box is SABR's small box around an adversarial point (Mao et al. 2023, section 3.4).

    Args:
        box_ratio, attack, statistics: as in sabr.
        the others: as in taps.
    """

    box_ratio: float = 0.4
    attack: Attack = method_field(ATTACKS, SABR_PGD)
    classifier_relus: int = 1
    steps: int = 20
    restarts: int = 1
    gradient_scale: float = 5.0
    relu_shrink: float = 1.0
    robust_weight: float = 1.0
    statistics: BatchNormStatistics = "batch"

    defaults: ClassVar[RunDefaults] = CERTIFIED
    of_the_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.box_ratio <= 1:
            raise ValueError(f"staps: box_ratio={self.box_ratio}: expected a share in (0, 1]")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        taps = TAPS(
            self.classifier_relus,
            self.steps,
            self.restarts,
            self.gradient_scale,
            self.relu_shrink,
            self.robust_weight,
        )
        return taps.over(views, small_box(views.box, x_adv, self.box_ratio))
