"""What decides which neuron a domain is split at, and the registry of `certify.branching`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attacks.registry import Registry
from certify.bab.ascent import Point, Relaxation, Task, ascend, bound
from certify.bab.domains import Domains
from certify.bab.dual import Dual
from certify.bab.unstable_core import Affine, Core

BRANCHINGS = Registry("branching", "certify.branching")

LEAST_GAIN = 1e-4
"""Gains below this are taken for it, so that a product is not decided by a child that gains nothing."""


@dataclass(frozen=True)
class Split:
    """Where to split domains.

    Attributes:
        neurons: one of each domain, `[D]`; -1 where none is unstable.
        dual: of the halves of those that have one, at the dual variables of their parents; None if they were not
            bounded there.
    """

    neurons: Tensor
    dual: Dual | None = None


class Branching(Protocol):
    """A frozen dataclass of hyper-parameters that picks a neuron."""

    def __call__(self, core: Core, domains: Domains, output: Affine) -> Split:
        """Where to split each of the domains."""
        ...


def intercept_scores(domains: Domains, relaxation: Relaxation) -> Tensor:
    """What the intercepts of the upper lines cost the bound, `[N, D]`; -1 for neurons that are not unstable."""
    return torch.where(relaxation.unstable, domains.A.clamp(max=0).neg() * relaxation.upper_intercept, -1.0)


def gap_scores(core: Core, domains: Domains, relaxation: Relaxation) -> Tensor:
    """What relaxing each neuron costs at the minimiser of the bound, `[N, D]`; -1 for those that are not unstable."""
    A, z = domains.A, domains.z
    value = torch.where(z > 0, z, core.slope * z)
    above = relaxation.upper * z + relaxation.upper_intercept - value
    below = value - relaxation.slopes(domains.alpha).lower * z
    return torch.where(relaxation.unstable, torch.where(A < 0, -A * above, A * below), -1.0)


def best_candidate(
    core: Core,
    domains: Domains,
    output: Affine,
    relaxation: Relaxation,
    candidates: Tensor,
    iterations: int,
    reduce: str,
) -> Split:
    """Of some neurons per domain, the one whose children have the best bounds.

    Args:
        relaxation: of the domains.
        candidates: `[K, D]`; those that are not unstable are passed over.
        iterations: ascent steps on the children; 0 evaluates them once.
        reduce: "product", "min" or "max" of what both children gain.
    """
    count = len(domains)
    neurons = torch.full((count,), -1, device=domains.low.device)
    new = relaxation.unstable.gather(0, candidates)
    for k in range(1, len(candidates)):
        new[k] &= (candidates[:k] != candidates[k]).all(0)
    kind, column = new.nonzero().unbind(1)
    if not len(kind):
        return Split(neurons)
    children = domains[column].halves(candidates[kind, column])
    start, task = Point(children.alpha, children.beta), Task(output, sign=children.sign)
    dual = None
    if iterations:
        bounds = children.relaxation(core)
        low = ascend(core, bounds, task, start, iterations, enough=0.0, minimisers=False).low
    else:
        dual = bound(core, children.relaxation(core), task, start)
        low = dual.low
    gains = torch.maximum(low.view(2, -1).clamp(max=0) - domains.low[column], low.new_tensor(LEAST_GAIN))
    if reduce == "product":
        score = gains.prod(0)
    else:
        least, most = gains.min(0).values, gains.max(0).values
        score = least + 1e-3 * most if reduce == "min" else most + 1e-3 * least
    scores = torch.full(candidates.shape, -1.0, dtype=score.dtype, device=score.device)
    scores[kind, column] = score
    best = scores.argmax(0)
    some = new.any(0).nonzero().flatten()
    neurons[some] = candidates[best[some], some]
    if dual is not None:
        pair = torch.zeros_like(candidates)
        pair[kind, column] = torch.arange(len(kind), device=pair.device)
        chosen = pair[best[some], some]
        dual = dual.select(torch.cat([chosen, chosen + len(kind)]))
    return Split(neurons, dual)
