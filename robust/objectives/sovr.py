"""SOVR: cross-entropy, and one-versus-the-rest loss where margins are small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import kl_to_reference, margin
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("sovr")
@dataclass(frozen=True)
class SOVR:
    """CE(z(x_adv), y), switched to w OVR(z(x_adv), y) for the share of the batch with the smallest logit margins
    (Kanai et al. 2023); unreproduced: the formulas beyond the abstract, and both default weights, are from memory.

    OVR(z, y) = -z_y + sum_k softplus(z_k). With kl_weight > 0 it is TSOVR, which adds TRADES' KL(p(x) || p(x_adv)).

    Args:
        percent: M, of the batch, rounded down to whole examples. 0 is adversarial training.
        ovr_weight: w (lambda in the paper).
        kl_weight: weight of the KL term; 0 leaves it out, and the clean pass with it.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    percent: float = 40.0
    ovr_weight: float = 0.4
    kl_weight: float = 0.0
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, keep="last", mode="keep"))
    statistics: BatchNormStatistics = "train"
    batch_norm: BatchNormOf = "own"

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise ValueError(f"percent={self.percent}: expected a share of the batch from 0 to 100")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        x_adv = adversarial(views, self.attack, statistics=self.statistics)
        clean = views.clean if self.kl_weight else None  # TRADES' order: the clean pass first
        logits = adversarial_logits(views, x_adv, self.batch_norm)
        all_logits, all_labels = views.whole(logits.detach()), views.whole(views.y)
        important = views.own(smallest_margins(all_logits, all_labels, self.percent))
        terms = {
            "adversarial": torch.where(important, 0.0, cross_entropy(logits, views.y)),
            "ovr": torch.where(important, self.ovr_weight * one_versus_rest(logits, views.y), 0.0),
        }
        if clean is not None:
            terms["kl"] = self.kl_weight * kl_to_reference(logits, views.y, clean)
        return terms


def one_versus_rest(logits: Tensor, y: Tensor) -> Tensor:
    """log(1 + exp(-z_y)) + sum over k != y of log(1 + exp(z_k)), `[B]`."""
    return F.softplus(logits).sum(1) - logits.gather(1, y[:, None]).squeeze(1)


def smallest_margins(logits: Tensor, y: Tensor, percent: float) -> Tensor:
    """The `percent` % of the batch for which z_y - max over k != y of z_k is smallest, bool `[B]`."""
    count = int(percent * len(y) / 100)
    chosen = torch.zeros_like(y, dtype=torch.bool)
    return chosen.index_fill(0, margin(logits, y).topk(count).indices, True)
