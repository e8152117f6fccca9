"""CROWN-IBP training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from certify.bounds.crown import Boxes, crown
from certify.bounds.interval import margins
from certify.interval import Interval
from certify.ops.affine import Linear
from certify.region import Region
from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults, certified_cross_entropy, mixed
from robust.views import Views, split_last

SMALLEST_CROWN_WEIGHT = 1e-5
"""Below this weight the backward pass is skipped, as in the official code."""


@OBJECTIVES.register("crown_ibp")
@dataclass(frozen=True)
class CrownIBP:
    """Cross-entropy of a mixture of CROWN-IBP and interval bounds.

    Bounds of hidden neurons are intervals; the margins get one backward pass. The mixture is
    beta CROWN-IBP + (1 - beta) IBP with beta falling from 1 as the radius grows (Zhang et al. 2020, section 3.2).

    Args:
        loss_fusion: bound the sum of exponentials of the margins instead of each margin, which takes a backward pass
            of one row instead of K - 1 (Xu et al. 2020, section 3.3; not always tighter).
        crown_weight: beta when the full radius is reached; 1 keeps CROWN-IBP throughout.
        clean_weight: weight of the clean cross-entropy when the full radius is reached; it falls from 1 along the
            radius where it is positive, and is 0 throughout otherwise.
    """

    loss_fusion: bool = True
    crown_weight: float = 0.0
    clean_weight: float = 0.0

    defaults: ClassVar[RunDefaults] = CERTIFIED

    def __call__(self, views: Views) -> dict[str, Tensor]:
        beta = 1 - (1 - self.crown_weight) * views.eps_fraction
        kappa = 1 - (1 - self.clean_weight) * views.eps_fraction if self.clean_weight else 0.0
        front, last = split_last(views.snapshot)
        hidden, boxes = views.walk(front, views.box, keep_boxes=True)
        low = margins(last, hidden, views.y)
        if beta < SMALLEST_CROWN_WEIGHT:
            return mixed(views, 1 - kappa, {"ibp": certified_cross_entropy(low, views.y)})
        if self.loss_fusion:
            high = _upper_margins(views, last, hidden, low)
            return mixed(views, 1 - kappa, {"crown_ibp": _fused(views, boxes, low, high, beta)})
        tight = beta * _crown(views, boxes, _margin_rows(views.y, low)) + (1 - beta) * low
        return mixed(views, 1 - kappa, {"crown_ibp": certified_cross_entropy(tight, views.y)})


def _margin_rows(y: Tensor, like: Tensor) -> Tensor:
    """Rows e_y - e_k for all classes k, `[B, K, K]`; row y is zero."""
    identity = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return identity[y].unsqueeze(1) - identity


def _crown(views: Views, boxes: Boxes, rows: Tensor) -> Tensor:
    """CROWN lower bounds `[B, R]` of rows of the logits, from given boxes of the hidden neurons."""
    box = views.box
    return crown(views.snapshot.with_spec(rows), Region(box.center, box.radius, views.x), boxes)[0]


def _upper_margins(views: Views, last: Linear, hidden: Interval, low: Tensor) -> Tensor:
    """Interval upper bounds of the margins z_y - z_k, `[B, K]`, 0 in column y."""
    logits = last.forward(hidden.center)
    center = logits.gather(1, views.y.unsqueeze(1)) - logits
    # A margin reaches as far above its centre as below.
    return 2 * center - low


def _fused(views: Views, boxes: Boxes, low: Tensor, high: Tensor, beta: float) -> Tensor:
    """log of an upper bound of S = sum_k exp(-m_k), where low <= m <= high are interval bounds of the margins.

    exp is convex, so on [-high, -low] it lies below its chord; the chords' weighted sum is one linear function of the
    logits, bounded by one backward pass. Everything is scaled by exp(-shift), shift the largest exponent, which keeps
    it finite (the unshifted form overflows for very negative margins).
    """
    shift = (-low).amax(1, keepdim=True).detach()
    at_low, at_high = (-low - shift).exp(), (-high - shift).exp()
    slope = (at_low - at_high) / (high - low).clamp(min=1e-8)
    slope = torch.where(high - low < 1e-6, at_low, slope)  # the chord's limit, the derivative
    # exp(-m) <= at_low - slope (m - low): a lower bound of sum slope m gives an upper bound of the sum.
    rows = (slope.unsqueeze(2) * _margin_rows(views.y, low)).sum(1, keepdim=True)
    tight = _crown(views, boxes, rows).squeeze(1)
    fused = (at_low + slope * low).sum(1) - tight
    total = beta * fused + (1 - beta) * at_low.sum(1)
    return total.clamp(min=1e-8).log() + shift.squeeze(1)
