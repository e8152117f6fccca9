"""CROWN as a verifier."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.crown import Boxes, crown, intermediate_boxes, zero_slopes
from certify.docket import NORMS, Docket, Request
from certify.graph import Snapshot
from certify.region import Region
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields

HIDDEN_SHARE = 0.75
"""Of the time that is left, for bounds of hidden neurons: the rest is for the margins that they are made for."""


@VERIFIERS.register("crown")
@dataclass(frozen=True)
class CROWN:
    """Linear bounds of the margins and of the hidden layers.

    Needs: any network with bound rules. Returns: certified or unknown, for correctly classified examples.
    How: every neuron that intervals leave unstable is bounded by a backward pass to the input; then the margins, with
    adaptive lower lines and with lower lines 0, of which the better counts: on networks trained for interval bounds
    the adaptive choice alone can be looser than intervals. Sound, not complete. Source: Zhang et al. (2018).

    Args:
        batch_size: examples bounded at a time.
    """

    batch_size: int = 16

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
        docket.prove("crown", bound, self.batch_size)
        return docket.verdicts("crown")


def bound(snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
    """The better of both choices of lower lines on CROWN's boxes."""
    now = time.perf_counter()
    boxes = intermediate_boxes(snapshot, region, deadline=now + HIDDEN_SHARE * (request.deadline - now))
    request.keep(boxes)
    return best_slopes(snapshot, region, boxes, request.deadline)


def best_slopes(snapshot: Snapshot, region: Region, boxes: Boxes, deadline: float = math.inf) -> tuple[Tensor, Tensor]:
    """Of the adaptive lower lines and the zero ones, the better bound of each row, with its scale."""
    low, scale = crown(snapshot, region, boxes, deadline=deadline)
    zero_low, zero_scale = crown(snapshot, region, boxes, zero_slopes(snapshot, boxes), deadline)
    better = zero_low > low
    return torch.where(better, zero_low, low), torch.where(better, zero_scale, scale)
