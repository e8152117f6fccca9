"""BaBSR: branching by an estimate that needs no bound of the children (Bunel et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify.bab.ascent import Relaxation
from certify.bab.branching import BRANCHINGS, Split, intercept_scores
from certify.bab.domains import Domains
from certify.bab.unstable_core import Affine, Core

SMALL = 1e-3
"""Below this the estimate says nothing, and the intercepts decide."""


def babsr_scores(core: Core, domains: Domains, relaxation: Relaxation) -> Tensor:
    """Estimated change of the bound by a split, `[N, D]`; -1 for neurons that are not unstable.

    The part of the bias takes the bias of the core's layer, which holds what the stable neurons before it add.
    """
    A, chord = domains.A, relaxation.upper
    bias = torch.maximum(A * core.bias * (chord - 1), A * core.bias * chord)
    intercept = A.clamp(max=0) * relaxation.upper_intercept
    return torch.where(relaxation.unstable, (bias + intercept).abs(), -1.0)


@BRANCHINGS.register("babsr")
@dataclass(frozen=True)
class BaBSR:
    """The neuron with the greatest score; where all scores are small, the one whose intercept costs most."""

    def __call__(self, core: Core, domains: Domains, output: Affine) -> Split:
        if not len(core):
            return Split(torch.full_like(domains.low, -1, dtype=torch.long))
        relaxation = domains.relaxation(core)
        best, chosen = babsr_scores(core, domains, relaxation).max(0)
        intercept = intercept_scores(domains, relaxation).argmax(0)
        return Split(torch.where(best < 0, -1, torch.where(best < SMALL, intercept, chosen)))
