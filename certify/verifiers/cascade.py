"""The cascade: attacks and bounds from cheap to dear, each on what the ones before left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from attacks.attack import ATTACKS, Attack
from attacks.methods.margin_pgd import MarginPGD
from attacks.registry import method_field
from attacks.threat import Ball
from certify.docket import NORMS, Docket
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields
from certify.verifiers import crown, crown_ibp, ibp
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.bab import BranchAndBound


@VERIFIERS.register("cascade")
@dataclass(frozen=True)
class Cascade:
    """IBP, a short attack, CROWN-IBP and CROWN, a long attack, then branch and bound.

    Needs: any network with bound rules. Returns: certified, falsified or unknown, for correctly classified examples;
    a verdict's method names the stage that decided: "cascade/ibp", "cascade/attack", "cascade/crown_ibp",
    "cascade/crown", "cascade/long_attack", "cascade/bab", "cascade/alpha_crown"; "cascade" where none did.
    How: intervals come first, since they cost two forward passes and an attack some dozens (on a net trained for them
    they decide most examples). Each stage sees the examples that are not decided and the targets that are not proven;
    the margin of a certified example is the least over targets of the best bounds seen. Networks that branch and bound
    has no rule for get alpha-CROWN in its place. Sound; complete where branch and bound is, given time.

    Args:
        attack, long_attack: searches for a witness before and after the bounds; "none" for no search.
        last: branch and bound, whose own timeout does not count here; "none" for alpha-CROWN.
        alpha: alpha-CROWN, where it takes the last place; "none" to leave it out.
        timeout: seconds per example, looked at between stages and within each but intervals; it may end a little later.
        batch_size: examples that the attacks and intervals take at a time; the dearer bounds take fewer.
    """

    attack: Attack | None = method_field(ATTACKS, MarginPGD(steps=10))
    long_attack: Attack | None = method_field(ATTACKS, MarginPGD(steps=100))
    last: BranchAndBound | None = method_field(VERIFIERS, BranchAndBound())
    alpha: AlphaCROWN | None = method_field(VERIFIERS, AlphaCROWN())
    timeout: float = 60.0
    batch_size: int = 256

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    falsifies: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = NORMS
    block: ClassVar[int] = 20

    def __post_init__(self) -> None:
        check_fields(self)
        for field, value, kind in (("last", self.last, BranchAndBound), ("alpha", self.alpha, AlphaCROWN)):
            if not isinstance(value, kind | None):
                raise ValueError(
                    f"cascade: {field} must be {VERIFIERS.spell(kind())} with fields, or none; got {value}"
                )

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        docket = Docket(model, x, y, ball, index, self.timeout)
        docket.prove("cascade/ibp", ibp.bound, self.batch_size)
        if self.attack is not None:
            docket.falsify("cascade/attack", self.attack, self.batch_size)
        docket.prove("cascade/crown_ibp", crown_ibp.bound, min(self.batch_size, crown_ibp.CROWNIBP.batch_size))
        docket.prove("cascade/crown", crown.bound, min(self.batch_size, crown.CROWN.batch_size))
        if self.long_attack is not None:
            docket.falsify("cascade/long_attack", self.long_attack, self.batch_size)
        if self.last is not None and docket.splits():
            docket.decide("cascade/bab", self.last.decide)
        elif self.alpha is not None:
            docket.prove("cascade/alpha_crown", self.alpha.bound, min(self.batch_size, self.alpha.batch_size))
        return docket.verdicts("cascade")
