"""alpha-CROWN as a verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.alpha_crown import alpha_crown
from certify.docket import NORMS, Docket, Request
from certify.graph import Snapshot
from certify.region import Region
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields


@VERIFIERS.register("alpha_crown")
@dataclass(frozen=True)
class AlphaCROWN:
    """CROWN with relaxation slopes that gradient ascent chooses.

    Needs: any network with bound rules. Returns: certified or unknown, for correctly classified examples.
    How: Adam on the slopes raises the sum of the margins' bounds; the best bound of all iterations counts; it stops as
    soon as all margins of a batch are proven. Sound, not complete. Source: Xu et al. (2021).

    Args:
        iterations: ascent steps.
        optimise_intermediate: also optimise the bounds of hidden neurons; several times dearer, tighter on deep nets.
        lr, decay: Adam's step on slopes in [0, 1], and its factor per iteration.
        batch_size: examples bounded at a time.
    """

    iterations: int = 20
    optimise_intermediate: bool = True
    lr: float = 0.1
    decay: float = 0.98
    batch_size: int = 4

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = False
    falsifies: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = NORMS
    block: ClassVar[int] = 20

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        docket = Docket(model, x, y, ball, index)
        docket.prove("alpha_crown", self.bound, self.batch_size)
        return docket.verdicts("alpha_crown")

    def bound(self, snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
        """Optimised bounds of all rows."""
        return alpha_crown(
            snapshot,
            region,
            iterations=self.iterations,
            lr=self.lr,
            decay=self.decay,
            optimise_intermediate=self.optimise_intermediate,
            wanted=request.wanted,
            enough=request.enough,
        )
