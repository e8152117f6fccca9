"""Holistic robustness."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust.views import Views
from robust.weighting import WEIGHTINGS, Weighting


@WEIGHTINGS.register("hr")
@dataclass(frozen=True)
class HolisticRobustness(Weighting):
    """sum_i p_i l_i + p_{N+1} max_i l_i with the worst p around the batch (Bennouna et al. 2023, program "HD").

    A share `corruption` of the batch may be poisoned, and counts as the worst loss; within a divergence `divergence`
    lies what another sample of the same size might look like. l_i is the example's whole loss, p a constant. The
    program is solved in closed form, see `worst_weights`.

    Args:
        corruption: alpha, share of the examples. divergence: r. Both 0: every example counts the same.
    """

    corruption: float = 0.0
    divergence: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.corruption <= 1 or self.divergence < 0:
            raise ValueError(f"expected 0 <= corruption <= 1 and divergence >= 0, got {self}")

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = torch.stack(list(terms.values())).sum(0).detach()
        p = worst_weights(losses.double(), self.corruption, self.divergence)
        weight = p[:-1].clone()
        # The extra atom's loss is that of the worst example.
        weight[losses.argmax()] += p[-1]
        weight = (len(losses) * weight).to(losses)
        return {name: weight * value for name, value in terms.items()}


def worst_weights(losses: Tensor, corruption: float, divergence: float) -> Tensor:
    """Maximiser p `[N + 1]` of sum_i p_i l_i + p_{N+1} max_i l_i over the program's feasible set.

    q_i + s_i = 1 / N, sum s = q_{N+1} <= corruption, KL(q || p) <= divergence, all not negative and p of sum 1. The
    mass s is best taken from the smallest losses; then p_i is proportional to q_i / (eta - l_i), with eta above all
    losses where KL(q || p) equals the divergence, found by bisection on log(eta - max l).

    Args:
        losses: l `[N]`, float64.
    """
    q = moved_to_the_worst(losses, corruption)
    top = losses.max()
    gaps = torch.cat([top - losses, losses.new_zeros(1)])
    spread = float(gaps[q > 0].max())
    if divergence == 0 or spread == 0:
        return q
    # At log(eta - max l) = high every p_i / q_i is within a factor 1 + divergence of every other, so KL <= divergence.
    low, high = math.log(spread) - 600.0, math.log(spread) - math.log(divergence)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _divergence(q, gaps, middle) > divergence else (low, middle)
    return _tilted(q, gaps, high)


def moved_to_the_worst(losses: Tensor, corruption: float) -> Tensor:
    """q `[N + 1]`: 1 / N each, less a mass `corruption` that the smallest losses give to the last atom."""
    count = len(losses)
    order = losses.argsort()
    before = torch.arange(count, dtype=losses.dtype, device=losses.device) / count
    taken = (corruption - before).clamp(0, 1 / count)
    q = losses.new_zeros(count + 1)
    q[order] = 1 / count - taken
    q[-1] = taken.sum()
    return q


def _tilted(q: Tensor, gaps: Tensor, log_distance: float) -> Tensor:
    weight = q / (gaps + math.exp(log_distance))
    return weight / weight.sum()


def _divergence(q: Tensor, gaps: Tensor, log_distance: float) -> float:
    p, used = _tilted(q, gaps, log_distance), q > 0
    return float((q[used] * (q[used] / p[used]).log()).sum())
