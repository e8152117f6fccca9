"""HAT: helper-based adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import kl_to_reference
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.active import Active, RunFacts
from robust.auxiliary import FrozenModel
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits, logits_at
from robust.views import Views


@OBJECTIVES.register("hat")
@dataclass(frozen=True)
class HAT:
    """TRADES + g CE(z(x + h (x_adv - x)), label that a standard network gives x_adv) (Rade & Moosavi-Dezfooli 2022).

    The helper points beyond x_adv carry the label of a network trained without attacks, which keeps margins from
    growing more than needed; they are not cut to the pixel range. Passes in training mode: x, x_adv, helper.

    Args:
        standard: checkpoint of a network trained without attacks.
        kl_weight: of TRADES' divergence. helper_weight: g. helper_reach: h.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial and the helper pass.
    """

    standard: str
    kl_weight: float = 2.5
    helper_weight: float = 0.5
    helper_reach: float = 2.0
    attack: Attack = method_field(
        ATTACKS, PGD(steps=10, step_size=0.25, loss="kl", start="gaussian", keep="last", mode="keep")
    )
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def start(self, run: RunFacts) -> Active:
        return _Active(self, FrozenModel(self.standard, run))


class _Active(Active):
    def __init__(self, hat: HAT, standard: FrozenModel) -> None:
        self.hat, self.standard = hat, standard

    def companions(self) -> list[Active]:
        return [self.standard]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        hat = self.hat
        x_adv = adversarial(views, hat.attack, statistics=hat.statistics)
        clean = views.clean
        attacked = adversarial_logits(views, x_adv, hat.batch_norm)
        helper = logits_at(views, views.x + hat.helper_reach * (x_adv - views.x), hat.batch_norm)
        label = views.once("helper label", lambda: self.standard(x_adv).argmax(1))
        return {
            "clean": cross_entropy(clean, views.y),
            "kl": hat.kl_weight * kl_to_reference(attacked, views.y, clean),
            "helper": hat.helper_weight * cross_entropy(helper, label),
        }
