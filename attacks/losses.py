"""What an attack climbs: one value per example, larger is worse for the model.

Every loss takes logits [B, K], the true classes y [B] and, where it is steered, one more tensor per example. A target
steers the gradient only: any misclassification counts as success.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]
LossName = Literal["cross_entropy", "margin", "dlr"]

# Keeps the quotient of the DLR losses finite where the leading logits are equal; the value of its authors.
TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """log sum exp(z) - z_y, [B]. Its gradient vanishes where the model is very sure of itself."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max over i != y of z_i, less z_y, [B]: positive exactly where misclassified (Carlini and Wagner, 2017)."""
    return runner_up(logits, y) - _at(logits, y)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y for the target classes [B]: the negative of what a verifier bounds from below, [B]."""
    return _at(logits, target) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, [B]: the margin in units of the gap between the largest and the third logit.

    Unchanged when the logits are shifted or scaled; the gradient flows through the denominator too. Two classes have
    no third logit, and in units of their gap the margin would not change at all: there it is the margin itself.

    Source: Croce and Hein (2020), eq. (6).
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    ordered = logits.topk(3, dim=1).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y in units of the gap between the largest logit and the mean of the third and fourth, [B].

    With three classes the unit is the (constant) spread of the logits, with two it is 1, see `dlr`.

    Source: Croce and Hein (2020), eq. (7).
    """
    if logits.shape[1] < 3:
        return targeted_margin(logits, y, target)
    if logits.shape[1] < 4:
        return targeted_margin(logits, y, target) / _spread(logits)
    ordered = logits.topk(4, dim=1).values
    unit = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return targeted_margin(logits, y, target) / (unit + TINY)


def kl_to_reference(logits: Tensor, y: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) for fixed reference logits [B, K], [B]; y plays no part.

    Its gradient is zero where the logits equal the reference: a climb from the clean point needs a random start.

    Source: Zhang et al. (2019), TRADES.
    """
    return F.kl_div(logits.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True).sum(1)


def logit_differences_moved(logits: Tensor, y: Tensor, reference: Tensor) -> Tensor:
    """Euclidean length of D(logits) - D(reference), D(z) = (z_y - z_k) over k != y, for fixed reference logits, [B].

    Its gradient is zero where the logits equal the reference.

    Source: Mao et al. (2023), smooth adversarial comp-sum losses.
    """
    moved = logits - reference
    return torch.linalg.vector_norm(_at(moved, y)[:, None] - moved, dim=1)


def runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """Largest logit of the wrong classes, [B]."""
    # Masked by -inf: a true class multiplied by zero would still win where all logits are negative.
    return logits.scatter(1, y[:, None], -math.inf).amax(1)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the predicted class differs from y, bool [B]."""
    return logits.argmax(1) != y


def strongest_targets(logits: Tensor, y: Tensor, count: int | None = None) -> Tensor:
    """Wrong classes in the order of their logits, largest first: [B, count], at most (and by default) K - 1 of them."""
    wrong = logits.shape[1] - 1
    return logits.scatter(1, y[:, None], -math.inf).topk(min(count or wrong, wrong), dim=1).indices


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}

REFERENCE_LOSSES: dict[str, Loss] = {"kl": kl_to_reference, "logit_differences": logit_differences_moved}
"""Losses that compare with the prediction at the clean point; their gradient is zero there."""


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _spread(logits: Tensor) -> Tensor:
    return (logits.amax(1) - logits.amin(1)).detach() + TINY
