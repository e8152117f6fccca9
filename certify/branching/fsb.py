"""FSB: filtered smart branching, candidates layer by layer (De Palma et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from certify.bab.branching import BRANCHINGS, Split, best_candidate
from certify.bab.domains import Domains
from certify.bab.unstable_core import Affine, Core
from certify.branching.babsr import babsr_scores


@BRANCHINGS.register("fsb")
@dataclass(frozen=True)
class FSB:
    """The best of a few candidates per layer by BaBSR's score, whose children are bounded once.

    Args:
        candidates: per layer.
        reduce: how the gains of both children are combined.
    """

    candidates: int = 1
    reduce: Literal["product", "min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"expected candidates >= 1, got {self}")

    def __call__(self, core: Core, domains: Domains, output: Affine) -> Split:
        relaxation = domains.relaxation(core)
        scores = babsr_scores(core, domains, relaxation)
        best = [
            layer.part.start + scores[layer.part].topk(min(self.candidates, len(layer.index)), 0).indices
            for layer in core.layers
            if len(layer.index)
        ]
        if not best:
            return Split(torch.full_like(domains.low, -1, dtype=torch.long))
        return best_candidate(core, domains, output, relaxation, torch.cat(best), 0, self.reduce)
