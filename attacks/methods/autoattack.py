"""AutoAttack: an ensemble of attacks, each of which sees what those before it left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attacks.ascent import Survivors, Task
from attacks.attack import ATTACKS, Attack
from attacks.gradient import Precision, forward
from attacks.losses import misclassified
from attacks.methods.apgd import APGD, APGDT
from attacks.methods.fab import FAB
from attacks.methods.square import Square
from attacks.mode import Mode, Model, attack_mode
from attacks.threat import Ball

# Gradients that the version for randomised models averages.
SAMPLES = 20


@ATTACKS.register("autoattack")
@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack: an example is robust only if it survives every attack of the ensemble.

    Needs: gradients in the input, of images [B, C, H, W]. Returns: the point that misclassifies an example, else the
    last point tried. Neither sound nor complete.

    Args:
        version: "standard" is APGD on cross-entropy, targeted APGD, targeted FAB and Square; for L1 with five restarts
            and five targets of APGD. "plus" is APGD on cross-entropy and on DLR and FAB with five restarts each,
            Square, targeted APGD and targeted FAB. "rand" is for models with noise of their own: APGD on cross-entropy
            and DLR, each gradient the mean of 20.
        individual: try every attack on every example, for evaluations that record what each one achieves. A call
            gives the same points.
        steps, queries: length of the runs of APGD and FAB, and of Square. With other values than the defaults the
            result must not be called AutoAttack.
        mode, precision, seed: see PGD.

    With fewer than four classes the losses differ from the published ones (see `losses.dlr`).

    Source: Croce and Hein (2020), "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", in the composition of the authors' code since August 2020.
    """

    version: Literal["standard", "plus", "rand"] = "standard"
    individual: bool = False
    steps: int = 100
    queries: int = 5000
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.queries < 1:
            raise ValueError(f"expected steps >= 1 and queries >= 1, got {self.steps} and {self.queries}")

    def stages(self, ball: Ball) -> dict[str, Attack]:
        """The attacks by name, in the order in which they run."""
        run: dict[str, Any] = {"mode": self.mode, "precision": self.precision, "seed": self.seed}
        length = {"steps": self.steps, **run}
        square = Square(queries=self.queries, **run)
        if self.version == "rand":
            return {
                "apgd_ce": APGD(samples=SAMPLES, **length),
                "apgd_dlr": APGD(loss="dlr", samples=SAMPLES, **length),
            }
        if self.version == "plus":
            return {
                "apgd_ce": APGD(restarts=5, **length),
                "apgd_dlr": APGD(loss="dlr", restarts=5, **length),
                "fab": FAB(restarts=5, **length),
                "square": square,
                "apgd_t": APGDT(targets=9, **length),
                "fab_t": FAB(targets=9, **length),
            }
        l1 = ball.norm == "l1"
        return {
            "apgd_ce": APGD(restarts=5 if l1 else 1, **length),
            "apgd_t": APGDT(targets=5 if l1 else 9, **length),
            "fab_t": FAB(targets=9, **length),
            "square": square,
        }

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        numbers = torch.arange(len(x)) if index is None else index.cpu()
        with attack_mode(model, self.mode), torch.no_grad():
            survivors = Survivors(Task(x, (y,), ball), misclassified(forward(model, x, self.precision), y))
            for stage in self.stages(ball).values():
                rows = survivors.left()
                if not len(rows):
                    break
                task = survivors.task.select(rows)
                index = numbers[rows.cpu()]
                points = stage(model, task.x, task.labels[0], task.ball, generator=generator, index=index)
                fooled = misclassified(forward(model, points, self.precision), task.labels[0])
                survivors.add(points, points.new_zeros(len(rows)).masked_fill(fooled, torch.inf), rows)
            return survivors.points
