"""Certified radii from local Lipschitz constants of margins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.lipschitz.local import local_lipschitz
from certify.spec import margin_spec
from certify.verdict import logits_of


def certified_radius(
    model: nn.Module, x: Tensor, y: Tensor, ball: Ball, method: str = "crown", **options: Any
) -> Tensor:
    """Radii `[B]`, at most the ball's, within which the prediction provably stays y; 0 where it is not y.

    A margin m with constant L over the ball stays positive within m / L. Constants over a smaller ball are smaller, so
    that the greatest radius lies where the ball's own is about the answer.

    Args:
        y: labels `[B]`.
        method, options: of `local_lipschitz`.
    """
    logits = logits_of(model, x).double()
    spec = margin_spec(y, logits.shape[1], torch.float64)
    margins = (spec @ logits.unsqueeze(2)).squeeze(2)
    constants = local_lipschitz(model, x, ball, method, spec, **options).ub
    # Less what rounding may add: the radius is for the network over real numbers.
    safe = margins - 1e-6 * logits.abs().amax(1, keepdim=True)
    radii = torch.where(constants > 0, safe / constants.clamp(min=torch.finfo(torch.float64).tiny), torch.inf)
    radii = torch.where(safe > 0, radii, 0.0).amin(1)
    return torch.minimum(radii, ball.eps_of(x.double()).flatten().expand(len(x)))
