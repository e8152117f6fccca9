"""Local Lipschitz constants of the margins as a verifier, and as a radius."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.crown import intermediate_boxes
from certify.bounds.jacobian import row_norms
from certify.docket import NORMS, Docket, Request
from certify.graph import Snapshot
from certify.lipschitz.linear import select
from certify.region import Region
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields


@VERIFIERS.register("lipschitz_margin")
@dataclass(frozen=True)
class LipschitzMargin:
    """Clean margins less eps times their local Lipschitz constants.

    Needs: any network with bound rules. Returns: certified or unknown, for correctly classified examples.
    How: the gradient of each margin is bounded over the ball by linear bounds; the margin falls by no more than the
    gradient's dual norm times the distance. Looser than `crown` with the same bounds before the activations, but what
    it finds holds between any two points of the ball. Sound, not complete. Source: Weng et al. (2018), Fast-Lip; Shi et
    al. (2022) for the bounds of the gradient.

    Args:
        bounds: "crown", or "interval" for interval arithmetic on the gradient.
        batch_size: examples bounded at a time; each has K - 1 margins, which are bounded separately.
    """

    bounds: Literal["crown", "interval"] = "crown"
    batch_size: int = 8

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
        docket.prove("lipschitz_margin", self.bound, self.batch_size)
        return docket.verdicts("lipschitz_margin")

    def bound(self, snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
        """Lower bounds of all rows `[B, R]`, and their scale of rounding."""
        margins = snapshot(region.x)
        batch, count = margins.shape
        owner = torch.arange(batch, device=margins.device).repeat_interleave(count)
        rows = torch.eye(count, dtype=margins.dtype, device=margins.device).repeat(batch, 1)
        boxes = select(intermediate_boxes(snapshot, region), owner)
        norm = "linf" if region.ball is None else region.ball.norm
        slopes = row_norms(snapshot.select(owner), boxes, rows, norm, self.bounds).ub.view(batch, count)
        fall = _reach(region).unsqueeze(1) * slopes
        return margins - fall, margins.abs() + fall


def _reach(region: Region) -> Tensor:
    """Greatest distance of a point of the region from the example, `[B]`."""
    if region.ball is not None:
        return region.ball.eps_of(region.x).flatten()
    return ((region.center - region.x).abs() + region.radius).flatten(1).amax(1)
