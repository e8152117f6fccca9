"""kFSB: filtered smart branching over all layers at once (De Palma et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from certify.bab.branching import BRANCHINGS, Split, best_candidate, gap_scores, intercept_scores
from certify.bab.domains import Domains
from certify.bab.unstable_core import Affine, Core


@BRANCHINGS.register("kfsb")
@dataclass(frozen=True)
class KFSB:
    """The best of a few candidates, whose children are bounded.

    Candidates are the neurons whose upper line's intercept costs most, and those whose relaxation costs most at the
    minimiser of the bound.

    Args:
        candidates: of each kind.
        iterations: ascent steps on the children; 0 bounds them once.
        reduce: how the gains of both children are combined. Their product needs up to half as many domains as the
            published minimum (scripts/bench/RESULTS.md).
    """

    candidates: int = 1
    iterations: int = 0
    reduce: Literal["product", "min", "max"] = "product"

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.iterations < 0:
            raise ValueError(f"expected candidates >= 1 and iterations >= 0, got {self}")

    def __call__(self, core: Core, domains: Domains, output: Affine) -> Split:
        count, relaxation = min(self.candidates, len(core)), domains.relaxation(core)
        kinds = (intercept_scores(domains, relaxation), gap_scores(core, domains, relaxation))
        candidates = torch.cat([scores.topk(count, 0).indices for scores in kinds])
        return best_candidate(core, domains, output, relaxation, candidates, self.iterations, self.reduce)
