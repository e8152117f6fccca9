"""Small boxes around adversarial points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.registry import method_field
from certify.interval import Interval
from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults, certified_cross_entropy, mixed
from robust.relu_shrinkage import with_shrunk_relus
from robust.training_attack import SABR_PGD, BatchNormStatistics, adversarial
from robust.views import Views


@OBJECTIVES.register("sabr")
@dataclass(frozen=True)
class SABR:
    """Interval bounds over a small box inside the ball, around a point that an attack finds (Mueller et al. 2023).

    Args:
        box_ratio: width of the small box relative to the ball's, lambda. 1 is IBP, towards 0 it becomes PGD training.
        attack: inner search.
        relu_shrink: factor on the upper bound of unstable neurons before each ReLU (0.8 for CIFAR-10 at 2/255); below 1
            the training bound is not sound, which evaluation never uses.
        robust_weight: weight of the bound term; the rest goes to the clean term.
        statistics: BatchNorm statistics under the attack.
    """

    box_ratio: float = 0.4
    attack: Attack = method_field(ATTACKS, SABR_PGD)
    relu_shrink: float = 1.0
    robust_weight: float = 1.0
    statistics: BatchNormStatistics = "batch"

    defaults: ClassVar[RunDefaults] = CERTIFIED

    def __post_init__(self) -> None:
        if not 0 < self.box_ratio <= 1:
            raise ValueError(f"sabr: box_ratio={self.box_ratio}: expected a share in (0, 1]")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        small = small_box(views.box, x_adv, self.box_ratio)
        snapshot = with_shrunk_relus(views.snapshot, self.relu_shrink)
        bounds = certified_cross_entropy(views.margins(small, snapshot), views.y)
        return mixed(views, self.robust_weight, {"sabr": bounds})


def small_box(box: Interval, x_adv: Tensor, ratio: float) -> Interval:
    """Box of `ratio` times the size of `box`, as near to `x_adv` as it fits inside.

    The radius is scaled pixel by pixel, so that it fits also where the pixel range cuts the large box (CTBench's rule).
    """
    radius = ratio * box.radius
    slack = box.radius - radius
    return Interval(x_adv.clamp(box.center - slack, box.center + slack), radius)
