"""SRST-AWR: semi-supervised robust self-training with adaptively weighted regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import kl_to_reference
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.active import Active, RunFacts
from robust.auxiliary import FrozenModel
from robust.objective import OBJECTIVES
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("awr")
@dataclass(frozen=True)
class AWR:
    """Label-smoothed CE on labelled images + g KL(teacher(x) / T || z(x) / T) + w c KL(p(x) || p(x_adv)) on all
    (Yang et al. 2023, SRST-AWR).

    `c = b <q, p(x)> + (1 - b) (1 - <q, p(x_adv)>)`, q the teacher's prediction at the clean image in both places; it is
    trained, not detached. The teacher is frozen, from semi-supervised training. An image of label -1 has none: it
    counts in the other terms alone. The attack sees the teacher's label. Passes in training mode: x, then x_adv; the
    authors pass labelled and unlabelled images apart, and the latter twice.

    Args:
        teacher: checkpoint.
        kl_weight: w; 8 on STL-10. distillation_weight: g. temperature: T; 1.0 on CIFAR-100.
        label_smoothing: share of the label's weight that is spread over all classes. agreement: b.
        attack: inner search; on CIFAR-100 and STL-10 of the cross-entropy.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    teacher: str
    kl_weight: float = 20.0
    distillation_weight: float = 4.0
    temperature: float = 1.2
    label_smoothing: float = 0.2
    agreement: float = 0.5
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, loss="kl", keep="last", mode="keep"))
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    takes_unlabelled: ClassVar[bool] = True

    def start(self, run: RunFacts) -> Active:
        return _Active(self, FrozenModel(self.teacher, run))


class _Active(Active):
    def __init__(self, awr: AWR, teacher: FrozenModel) -> None:
        self.awr, self.teacher = awr, teacher

    def companions(self) -> list[Active]:
        return [self.teacher]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        awr = self.awr
        taught = views.once("teacher", lambda: self.teacher(views.x).detach())
        x_adv = adversarial(views, awr.attack, statistics=awr.statistics, labels=taught.argmax(1))
        clean = views.clean
        logits = adversarial_logits(views, x_adv, awr.batch_norm)
        q, p, p_adv = (z.softmax(1) for z in (taught, clean, logits))
        c = awr.agreement * (q * p).sum(1) + (1 - awr.agreement) * (1 - (q * p_adv).sum(1))
        heat = awr.temperature
        return {
            "clean": labelled_cross_entropy(clean, views.y, awr.label_smoothing, views.mean(_labelled(views.y))),
            "distillation": awr.distillation_weight * kl_to_reference(clean / heat, views.y, taught / heat),
            "kl": awr.kl_weight * c * kl_to_reference(logits, views.y, clean),
        }


def labelled_cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float, share: Tensor | None = None) -> Tensor:
    """Label-smoothed cross-entropy, 0 where the label is -1, `[B]`; the batch mean is the mean over the labelled.

    Args:
        share: of the images that have labels, in the whole batch; None for that among these.
    """
    losses = F.cross_entropy(logits, y, reduction="none", ignore_index=-1, label_smoothing=label_smoothing)
    share = _labelled(y).mean() if share is None else share
    return losses / torch.where(share > 0, share, 1.0)


def _labelled(y: Tensor) -> Tensor:
    return (y >= 0).to(torch.float32)
