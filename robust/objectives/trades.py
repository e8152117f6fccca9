"""TRADES."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import kl_to_reference
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import TRADES_STEP, BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("trades")
@dataclass(frozen=True)
class TRADES:
    """CE(z(x), y) + w KL(p(x) || p(x_adv)), the points being those of largest KL (Zhang et al. 2019).

    Both arguments of the KL carry gradient. Passes in training mode: x, then x_adv. In l2 the authors' steps are
    2 / steps of the radius, and points are cut by the pixel range first:
    `attack=(pgd:steps=10,step_size=0.2,loss=kl,start=gaussian,keep=last,mode=keep,cut_first=true)`.

    Args:
        kl_weight: w (beta in the paper, 1 / lambda).
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
        label_smoothing: share of the label that is spread over all classes in the clean term.
        second_clean_pass: pass x through the network once more at the end, as the authors' code does: the same loss,
            but running statistics that hold x twice.
    """

    kl_weight: float = 6.0
    attack: Attack = method_field(
        ATTACKS, PGD(steps=10, step_size=TRADES_STEP, loss="kl", start="gaussian", keep="last", mode="keep")
    )
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"
    second_clean_pass: bool = False
    label_smoothing: float = 0.0

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        clean = views.clean
        logits = adversarial_logits(views, x_adv, self.batch_norm)
        if self.second_clean_pass:
            clean = views.train(views.x)
        divergence = kl_to_reference(logits, views.y, clean)
        return {
            "clean": cross_entropy(clean, views.y, self.label_smoothing),
            "kl": self.kl_weight * divergence,
        }
