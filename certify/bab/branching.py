"""What decides which neuron a domain is split at, and the registry of `certify.branching`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attacks.registry import Registry
from certify.bab.ascent import Point, Task, ascend
from certify.bab.domains import Domains
from certify.bab.unstable_core import Affine, Core

BRANCHINGS = Registry("branching", "certify.branching")

LEAST_GAIN = 1e-4
"""Gains below this are taken for it, so that a product is not decided by a child that gains nothing."""


class Branching(Protocol):
    """A frozen dataclass of hyper-parameters that picks a neuron."""

    def __call__(self, core: Core, domains: Domains, output: Affine) -> Tensor:
        """The neuron to split in each domain, `[D]`; -1 where none is unstable."""
        ...


def intercept_scores(core: Core, domains: Domains) -> Tensor:
    """What the intercepts of the upper lines cost the bound, `[N, D]`; -1 for neurons that are not unstable."""
    relaxation = domains.relaxation(core)
    return torch.where(relaxation.unstable, domains.A.clamp(max=0).neg() * relaxation.upper_intercept, -1.0)


def gap_scores(core: Core, domains: Domains) -> Tensor:
    """What relaxing each neuron costs at the minimiser of the bound, `[N, D]`; -1 for those that are not unstable."""
    relaxation = domains.relaxation(core)
    A, z = domains.A, domains.z
    value = torch.where(z > 0, z, core.slope * z)
    above = relaxation.upper * z + relaxation.upper_intercept - value
    below = value - relaxation.slopes(domains.alpha).lower * z
    return torch.where(relaxation.unstable, torch.where(A < 0, -A * above, A * below), -1.0)


def best_candidate(
    core: Core, domains: Domains, output: Affine, candidates: Tensor, iterations: int, reduce: str
) -> Tensor:
    """Of some neurons per domain, the one whose children have the best bounds.

    Args:
        candidates: `[K, D]`; those that are not unstable are passed over.
        iterations: ascent steps on the children; 0 evaluates them once.
        reduce: "product", "min" or "max" of what both children gain.
    """
    count, kinds = len(domains), len(candidates)
    if not kinds:
        return torch.full_like(domains.low, -1, dtype=torch.long)
    column = torch.arange(count, device=candidates.device).repeat(kinds)
    children = domains[column].halves(candidates.flatten())
    start = Point(children.alpha, children.beta)
    task = Task(output, sign=children.sign)
    found = ascend(core, children.relaxation(core), task, start, iterations, enough=0.0, minimisers=False)
    low = torch.maximum(found.low.view(2, kinds, count), domains.low).clamp(max=0)
    gains = (low - domains.low).clamp(min=LEAST_GAIN)
    if reduce == "product":
        score = gains.prod(0)
    else:
        least, most = gains.min(0).values, gains.max(0).values
        score = least + 1e-3 * most if reduce == "min" else most + 1e-3 * least
    unstable = domains.relaxation(core).unstable
    score = torch.where(unstable.gather(0, candidates), score, -1.0)
    chosen = candidates.gather(0, score.argmax(0, keepdim=True))[0]
    return torch.where(unstable.any(0), chosen, -1)
