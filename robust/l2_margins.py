"""What the losses of l2-certified networks share: logits, and how fast the adversary can bring two of them together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robust.l2_net import L2Net
from robust.views import Views, split_last


class L2Logits(NamedTuple):
    """Logits `[B, K]`, the radius `[B]`, and the l2 constants `[K, K]` of all differences of two logits.

    constants[j, i] = K ||w_j - w_i||_2, K the constant of the layers before the last. The diagonal is 0 and must never
    win a maximum over rivals.
    """

    logits: Tensor
    eps: Tensor
    constants: Tensor

    def reach(self, classes: Tensor) -> Tensor:
        """By how much every logit can gain on that of one class per example within the radius, `[B, K]`."""
        return self.eps.unsqueeze(1) * self.constants[classes]


def l2_logits(views: Views, iterations: int) -> L2Logits:
    """Logits of the images, the step's radius, and constants by the model's own estimate of K.

    Args:
        iterations: of power iteration, from where the last step left it.

    Raises:
        ValueError: the ball is not l2, or the model does not estimate its constant.
    """
    model = views.graph.model
    if views.ball.norm != "l2":
        raise ValueError(f"l2-certified training needs norm='l2', got {views.ball.norm!r}")
    if not isinstance(model, L2Net):
        raise ValueError(
            f"l2-certified training needs a model that estimates its Lipschitz constant (liresnet, gloro_cnn, "
            f"lipschitz_cnn), got {type(model).__name__}"
        )
    front, last = split_last(views.snapshot)
    # One snapshot for everything: weights under a parametrization are computed once.
    logits = last.forward(front(views.x))
    eps = views.ball.eps_of(views.x).flatten().expand(len(views.x)).to(logits)
    return L2Logits(logits, eps, row_distances(last.weight) * model.trunk_lipschitz(iterations))


def row_distances(weight: Tensor) -> Tensor:
    """||w_i - w_j||_2 of the rows of `[K, n]`: `[K, K]`; its gradient is 0 on the diagonal."""
    # Not by products: |a|^2 + |b|^2 - 2 ab cancels where rows are close.
    return torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
