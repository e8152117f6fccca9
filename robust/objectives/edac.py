"""EDAC: a step that evens out the logits before every step of another objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.registry import method_field
from robust.active import Active, RunFacts, begin
from robust.objective import ADVERSARIAL, OBJECTIVES, RunDefaults
from robust.objectives.pgd import PGDTraining
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("edac")
@dataclass(frozen=True)
class EDAC:
    """Another objective with a step of its own before each of its steps, on the same images and by the same optimiser:
    the gradient of w std(z(x_adv)), the standard deviation over the K logits (in CTBench, Mao et al. 2025).

    Everything is computed anew for the objective's step, the attack included. Adam's moments see both steps, and
    through them w acts: a lone Adam step would not change with it. Regularisers, weightings and weight perturbations
    act on the objective's steps only.

    Args:
        objective: of every other step.
        weight: w; 0.3, on TinyImageNet 0.1. The deviation is the unbiased one, with K - 1 below the fraction.
        attack: inner search of the step before.
        statistics, batch_norm: BatchNorm statistics under the attack and at its points, see `pgd`.
    """

    objective: Any = method_field(OBJECTIVES, PGDTraining())
    weight: float = 0.3
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, unit="box", keep="last", mode="keep"))
    statistics: BatchNormStatistics = "batch"
    batch_norm: BatchNormOf = "clean"

    replays: ClassVar[int] = 2
    steps_alone: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if getattr(self.objective, "replays", 1) != 1:
            name = OBJECTIVES.spell(self.objective).partition(":")[0]
            raise ValueError(f"edac: {name} repeats mini-batches itself; give an objective that does not, such as pgd")

    @property
    def defaults(self) -> RunDefaults:
        """Those of the objective."""
        defaults: RunDefaults = getattr(self.objective, "defaults", ADVERSARIAL)
        return defaults

    def start(self, run: RunFacts) -> Active:
        return _Active(self, run)


class _Active(Active):
    def __init__(self, edac: EDAC, run: RunFacts) -> None:
        self.edac, self.steps_per_epoch = edac, run.steps_per_epoch
        self.objective = begin(edac.objective, run)

    def companions(self) -> list[Active]:
        return [self.objective] if isinstance(self.objective, Active) else []

    def __call__(self, views: Views) -> dict[str, Tensor]:
        if round(views.epoch * self.steps_per_epoch) % EDAC.replays >= EDAC.steps_alone:
            terms: dict[str, Tensor] = self.objective(views)
            return terms
        x_adv = adversarial(views, self.edac.attack, statistics=self.edac.statistics)
        return {"edac": self.edac.weight * adversarial_logits(views, x_adv, self.edac.batch_norm).std(1)}
