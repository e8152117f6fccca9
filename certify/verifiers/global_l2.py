"""Global Lipschitz constants as a verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.global_l2 import global_l2
from certify.checks import check_problem
from certify.docket import Docket, Request
from certify.graph import Snapshot
from certify.precision import rounding_at_points
from certify.region import Region
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields


@VERIFIERS.register("global_l2")
@dataclass(frozen=True)
class GlobalL2:
    """One forward pass and the l2 Lipschitz constant of the network below its last layer.

    Needs: a network of dense and convolutional layers, 1-Lipschitz activations (ReLU, MinMax ...), pools and sums, and
    an l2 ball. Returns: certified or unknown, for correctly classified examples.
    How: y_t - y_i is K ||w_t - w_i||_2 - Lipschitz, K the product of certified operator norms; weak for nets that were
    not trained for it. Sound, not complete. Source: Leino et al. (2021), with norms that are upper bounds.

    Args:
        batch_size: examples bounded at a time.
    """

    batch_size: int = 256

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = False
    falsifies: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        check_problem(model, x, y, ball, self.norms)
        docket = Docket(model, x, y, ball, index)
        docket.prove("global_l2", bound, self.batch_size, _at_centers)
        return docket.verdicts("global_l2")


def bound(snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
    """Bounds of all rows by the global constant."""
    return global_l2(snapshot, region)


def _at_centers(snapshot: Snapshot, region: Region) -> Tensor:
    return rounding_at_points(snapshot, region.x)
