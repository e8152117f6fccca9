"""CROWN-IBP as a verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.interval import interval_walk
from certify.docket import NORMS, Docket, Request
from certify.graph import Snapshot
from certify.region import Region
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields
from certify.verifiers.crown import best_slopes


@VERIFIERS.register("crown_ibp")
@dataclass(frozen=True)
class CROWNIBP:
    """Linear bounds of the margins on interval bounds of the hidden layers.

    Needs: any network with bound rules. Returns: certified or unknown, for correctly classified examples.
    How: boxes forward, then one backward pass per choice of lower lines (adaptive, and 0 everywhere); the better bound
    of each margin counts. Sound, not complete. Source: Zhang et al. (2020).

    Args:
        batch_size: examples bounded at a time.
    """

    batch_size: int = 64

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = False
    falsifies: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = NORMS

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        docket = Docket(model, x, y, ball, index)
        docket.prove("crown_ibp", bound, self.batch_size)
        return docket.verdicts("crown_ibp")


def bound(snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
    """The better of both choices of lower lines on interval boxes."""
    return best_slopes(snapshot, region, interval_walk(snapshot, region.interval())[1], request.deadline)
