"""CROWN-IBP: intermediate bounds by intervals, outputs by one backward pass (Zhang et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from certify.bounds.crown import crown
from certify.bounds.interval import interval_walk
from certify.graph import Snapshot
from certify.region import Region


def crown_ibp(snapshot: Snapshot, region: Region) -> tuple[Tensor, Tensor]:
    """Lower bounds of all outputs `[B, R]` of a network that ends in its specification, and their scale of rounding."""
    _, boxes = interval_walk(snapshot, region.interval())
    return crown(snapshot, region, boxes)
