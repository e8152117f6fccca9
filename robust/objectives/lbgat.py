"""LBGAT: learnable boundary guided adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import kl_to_reference
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.active import Active, RunFacts
from robust.auxiliary import TrainedAlong
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import TRADES_STEP, BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("lbgat")
@dataclass(frozen=True)
class LBGAT:
    """Squared distance of z(x_adv) to a clean teacher's logits t(x) + CE(t(x), y) + w KL(p(x) || p(x_adv))
    (Cui et al. 2021).

    The teacher is trained along by the same optimiser, and by all terms in which it occurs. The distance is the mean
    over the classes. Passes in training mode: x_adv, then x, then the teacher's.

    Args:
        teacher: architecture of the teacher.
        kl_weight: w; 0 and 6 are the paper's LBGAT0 and LBGAT6.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    teacher: str = "resnet18"
    kl_weight: float = 6.0
    attack: Attack = method_field(
        ATTACKS, PGD(steps=10, step_size=TRADES_STEP, loss="kl", start="gaussian", keep="last", mode="keep")
    )
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def start(self, run: RunFacts) -> Active:
        return _Active(self, TrainedAlong(self.teacher, run))


class _Active(Active):
    def __init__(self, lbgat: LBGAT, teacher: TrainedAlong) -> None:
        self.lbgat, self.teacher = lbgat, teacher

    def companions(self) -> list[Active]:
        return [self.teacher]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        lbgat = self.lbgat
        x_adv = adversarial(views, lbgat.attack, statistics=lbgat.statistics)
        logits = adversarial_logits(views, x_adv, lbgat.batch_norm)
        clean = views.clean
        guide = self.teacher(views.x)
        return {
            "distillation": (logits - guide).square().mean(1),
            "teacher": cross_entropy(guide, views.y),
            "kl": lbgat.kl_weight * kl_to_reference(logits, views.y, clean),
        }
