"""Distributionally robust reweighting with a divergence penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust.active import Active, Moment, RunFacts
from robust.views import Views
from robust.weighting import WEIGHTINGS, Weighting


@WEIGHTINGS.register("kl_dro")
@dataclass(frozen=True)
class KLDRO:
    """w_i = exp(l_i / r) / u, the worst weights under a KL penalty to uniform ones: their loss is
    r log mean_i exp(l_i / r); unreproduced, from memory.

    l_i is the example's whole loss, detached. The denominator u follows the batch means of exp(l / r) as a moving
    average, which lessens the bias of small batches. This is the reweighting of doubly robust adversarial training (Sow
    et al. 2024) without its implicit gradient through the attack.

    Args:
        temperature: r; a large one leaves the examples equal.
        momentum: weight of the past means in u; 0 takes the batch alone, and the weights are B softmax(l / r).
    """

    temperature: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"expected temperature > 0 and 0 <= momentum < 1, got {self}")

    def start(self, run: RunFacts) -> Active:
        return _Active(self)


class _Active(Active, Weighting):
    def __init__(self, dro: KLDRO) -> None:
        self.dro = dro
        self.log_mean = torch.tensor(math.nan, dtype=torch.float64)
        self.latest: Tensor | None = None
        self.seen: list[Tensor] = []

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = torch.stack(list(terms.values())).sum(0).detach() / self.dro.temperature
        log_mean = self.latest = scores.logsumexp(0) - math.log(len(scores))
        weight = (scores - self._mixed(log_mean)).exp()
        return {name: weight * value for name, value in terms.items()}

    def _mixed(self, log_mean: Tensor) -> Tensor:
        """Logarithm of u when a batch with this mean has joined."""
        if self.log_mean.isnan() or not self.dro.momentum:
            return log_mean
        past, share = self.log_mean.to(log_mean), self.dro.momentum
        return torch.logaddexp(past + math.log(share), log_mean + math.log1p(-share))

    def see(self, views: Views, moment: Moment) -> None:
        if self.latest is not None:  # None behind a step at radius 0, which is not weighted
            self.seen.append(self.latest.cpu().double())
            self.latest = None

    def after_step(self, moment: Moment) -> None:
        if self.seen:
            self.log_mean = self._mixed(torch.stack(self.seen).logsumexp(0) - math.log(len(self.seen)))
            self.seen = []

    def state(self) -> dict[str, Tensor]:
        return {"log_mean": self.log_mean}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.log_mean = state["log_mean"].clone()
