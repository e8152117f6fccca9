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
from certify.verifier import VERIFIERS
from certify.verifiers import crown, crown_ibp, ibp
from certify.verifiers.alpha_crown import AlphaCROWN


@VERIFIERS.register("cascade")
@dataclass(frozen=True)
class Cascade:
    """IBP, a short attack, CROWN-IBP, CROWN and alpha-CROWN, then a long attack.

    Needs: any network with bound rules. Returns: certified, falsified or unknown, for correctly classified examples;
    a verdict's method names the stage that decided: "cascade/attack", "cascade/ibp", "cascade/crown_ibp",
    "cascade/crown", "cascade/alpha_crown", "cascade/long_attack"; "cascade" where none did.
    How: intervals come first, since they cost two forward passes and an attack some dozens (on a net trained for them
    they decide most examples). Each stage sees the examples that are not decided and the targets that are not proven;
    the margin of a certified example is the least over targets of the best bounds seen. Sound, not complete.

    Args:
        attack, long_attack: searches for a witness before and after the bounds; "none" for no search.
        alpha_iterations: ascent steps of alpha-CROWN; 0 leaves it out.
        optimise_intermediate: see the verifier alpha_crown.
        timeout: seconds per example, looked at between stages and within alpha-CROWN; a stage may end a little later.
        batch_size: examples that the attacks and intervals take at a time; the dearer bounds take fewer.
    """

    attack: Attack | None = method_field(ATTACKS, MarginPGD(steps=10))
    long_attack: Attack | None = method_field(ATTACKS, MarginPGD(steps=100, restarts=5))
    alpha_iterations: int = 20
    optimise_intermediate: bool = True
    timeout: float = 60.0
    batch_size: int = 256

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = False
    falsifies: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = NORMS
    block: ClassVar[int] = 20

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        docket = Docket(model, x, y, ball, index, self.timeout)
        alpha = AlphaCROWN(self.alpha_iterations, self.optimise_intermediate)
        docket.prove("cascade/ibp", ibp.bound, self.batch_size)
        if self.attack is not None:
            docket.falsify("cascade/attack", self.attack, self.batch_size)
        docket.prove("cascade/crown_ibp", crown_ibp.bound, min(self.batch_size, crown_ibp.CROWNIBP.batch_size))
        docket.prove("cascade/crown", crown.bound, min(self.batch_size, crown.CROWN.batch_size))
        if self.alpha_iterations:
            docket.prove("cascade/alpha_crown", alpha.bound, min(self.batch_size, alpha.batch_size))
        if self.long_attack is not None:
            docket.falsify("cascade/long_attack", self.long_attack, self.batch_size)
        return docket.verdicts("cascade")
