"""FRL: fair robust learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.active import Active, Moment, RunFacts
from robust.class_errors import class_errors
from robust.views import Views
from robust.weighting import WEIGHTINGS, Radius, Weighting, check_class_steps


@WEIGHTINGS.register("frl")
@dataclass(frozen=True)
class FRL:
    """Class weights on TRADES' two terms, and class radii, from Lagrange multipliers of fairness (Xu et al. 2021).

    Behind each epoch, on the held-out images: gamma = err_k - err - bound, for the clean error and for the boundary
    error (right clean, wrong attacked); then lambda += rate gamma (2 rate for the boundary), cut at 0 and scaled to a
    sum of at most `limit`, and mu += radius_rate gamma_boundary. Class k's weights are 1 / K + lambda_k - mean lambda,
    of the clean and of the boundary multipliers for the terms clean and kl; a batch's loss is divided by the sum of all
    its weights. The radius is clamp(exp(2 mu_k), 0.98, 3) eps, with steps as they were.

    The default is FRL-RWRM; `radius_rate=0` is the authors' FRL-RW. They go on from a robust network
    (`trades:kl_weight=1` at a small learning rate) and measure once before the first epoch, in which here all classes
    count the same.

    Args:
        rate: of the multipliers, halved every `halve_every` epochs. radius_rate: of mu.
        clean_bound, boundary_bound: by how much a class may be worse than the average.
        limit: largest sum of the multipliers.
        attack: for the boundary error.
    """

    rate: float = 0.05
    radius_rate: float = 0.1
    clean_bound: float = 0.1
    boundary_bound: float = 0.1
    limit: float = 0.5
    halve_every: int = 40
    attack: Attack = method_field(ATTACKS, PGD(steps=20, step_size=0.25, keep="last"))

    def start(self, run: RunFacts) -> Active:
        if self.radius_rate:
            check_class_steps("frl", run)
        return _Active(self, run)


class _Active(Active, Weighting):
    def __init__(self, frl: FRL, run: RunFacts) -> None:
        self.frl, self.ball, self.classes = frl, run.ball, run.classes
        self.clean, self.boundary, self.log_radius = torch.zeros(3, run.classes, dtype=torch.float64)

    def radius(self, y: Tensor) -> Radius | None:
        if not self.frl.radius_rate:
            return None
        factor = (2 * self.log_radius).exp().clamp(0.98, 3).to(y.device)[y]
        return Radius(factor, torch.ones_like(factor))

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if set(terms) != {"clean", "kl"}:
            raise ValueError(f"frl weights the terms clean and kl (use trades), the objective has {', '.join(terms)}")
        clean, boundary = (fair_weights(m).to(views.x)[views.y] for m in (self.clean, self.boundary))
        scale = len(views.y) / (clean + boundary).sum()
        return {"clean": scale * clean * terms["clean"], "kl": scale * boundary * terms["kl"]}

    def after_epoch(self, moment: Moment) -> None:
        frl = self.frl
        errors = class_errors(moment.model, moment.held_out(), frl.attack, self.ball, self.classes)
        boundary = errors.attacked - errors.clean
        share = errors.images / errors.images.sum()
        excess = errors.clean - (share * errors.clean).sum() - frl.clean_bound
        boundary_excess = boundary - (share * boundary).sum() - frl.boundary_bound
        rate = frl.rate / 2 ** ((round(moment.epoch) + 1) // frl.halve_every)
        self.clean = limited(self.clean + rate * excess, frl.limit)
        self.boundary = limited(self.boundary + 2 * rate * boundary_excess, frl.limit)
        self.log_radius = self.log_radius + frl.radius_rate * boundary_excess

    def state(self) -> dict[str, Tensor]:
        return {"clean": self.clean, "boundary": self.boundary, "log_radius": self.log_radius}

    def restore(self, state: dict[str, Tensor]) -> None:
        names = ("clean", "boundary", "log_radius")
        self.clean, self.boundary, self.log_radius = (state[name].cpu().clone() for name in names)


def fair_weights(multipliers: Tensor) -> Tensor:
    """1 / K + lambda_k - mean lambda, `[K]`; they sum to 1, and are positive where lambda sums to less than 1."""
    return 1 / len(multipliers) + multipliers - multipliers.mean()


def limited(multipliers: Tensor, limit: float) -> Tensor:
    """Multipliers cut at 0 and scaled down to a sum of `limit` where it is larger."""
    positive = multipliers.clamp(min=0)
    return positive * (limit / positive.sum().clamp(min=1e-12)).clamp(max=1.0)
