"""Registry of training objectives, and what several of them share.

An objective is a frozen dataclass that maps the views of a mini-batch to named terms, one value per example each. The
loss is the sum of the terms' batch means; every term is logged. Weightings know the terms by their names: "clean" and
"adversarial" compare logits with the label, "kl" compares two predictions; a method's other terms have its own names.

A class fact `defaults` says what a run takes for settings that the user leaves open; objectives without one have those
of adversarial training.

An objective that needs a memory or a second network has `start(run)`, see `robust.active`. One whose steps repeat a
mini-batch has a class fact `replays`; the first `steps_alone` of them are its own, without regularisers, weightings and
weight perturbations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from attacks.registry import Registry
from robust.views import Views

OBJECTIVES = Registry("objective", "robust.objectives")


@dataclass(frozen=True)
class RunDefaults:
    """Settings of a run that leaves them open; see `robust.settings.Settings` for what they are."""

    eps_schedule: str
    clip_norm: float
    validator: str


ADVERSARIAL = RunDefaults("constant", 0.0, "pgd:steps=10,step_size=0.25")
"""Adversarial training: the full radius from the first step, no clipping, validation by a short attack."""

CERTIFIED = RunDefaults("smooth:start=0,end=10", 10.0, "ibp")
"""Certified training: a growing radius, clipped gradients, validation by interval bounds."""


L2_CERTIFIED = RunDefaults("smooth:start=0,end=10", 10.0, "global_l2")
"""Networks whose Lipschitz constant certifies them: as CERTIFIED, validation by that constant."""


def defaults_of(objective: str) -> RunDefaults:
    """The defaults of the objective that the text spells."""
    defaults: RunDefaults = getattr(OBJECTIVES.parse(objective), "defaults", ADVERSARIAL)
    return defaults


class Objective(Protocol):
    """Frozen dataclass of hyper-parameters; a class fact `norms` names the balls of one that is not for all."""

    def __call__(self, views: Views) -> dict[str, Tensor]:
        """Terms of the loss, each `[B]`."""
        ...


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per example, `[B]`."""
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)


def certified_cross_entropy(margins: Tensor, y: Tensor) -> Tensor:
    """Upper bound of the cross-entropy over the box, `[B]`, from lower bounds of the margins `[B, K]` (0 in column y).

    log(1 + sum_k exp(-m_k)): the softmax is taken after bounding (Gowal et al. 2018, eq. 12).
    """
    return cross_entropy(-margins, y)


def mixed(views: Views, robust_weight: float, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """(1 - w) clean cross-entropy + w terms; the clean term is left out where its weight is 0."""
    weighted = {name: value if robust_weight == 1 else robust_weight * value for name, value in terms.items()}
    if robust_weight == 1:
        return weighted
    return {"clean": (1 - robust_weight) * cross_entropy(views.clean, views.y), **weighted}
