"""Interval bound propagation as a verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.interval import ibp
from certify.docket import NORMS, Docket, Request
from certify.graph import Snapshot
from certify.region import Region
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields


@VERIFIERS.register("ibp")
@dataclass(frozen=True)
class IBP:
    """Interval bounds of the margins.

    Needs: any network with interval rules. Returns: certified or unknown, for correctly classified examples.
    How: boxes are propagated from layer to layer; about two forward passes. Tight only for networks trained for it.
    Sound, not complete. Source: Gowal et al. (2018).

    Args:
        batch_size: examples bounded at a time.
    """

    batch_size: int = 256

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
        docket.prove("ibp", bound, self.batch_size)
        return docket.verdicts("ibp")


def bound(snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
    """Interval bounds of all rows."""
    return ibp(snapshot, region)
