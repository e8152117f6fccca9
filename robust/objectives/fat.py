"""FAT: friendly adversarial training."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attacks.methods.friendly_pgd import FriendlyPGD
from attacks.registry import method_field
from robust.objective import ADVERSARIAL, OBJECTIVES, RunDefaults
from robust.objectives.pgd import PGDTraining
from robust.views import Views


@OBJECTIVES.register("fat")
@dataclass(frozen=True)
class FAT:
    """Another objective with early-stopped PGD, whose patience tau grows during the run (Zhang et al. 2020).

    The authors' code reorders the batch by the step at which examples stop; here the order stays.

    Args:
        objective: with the attack friendly_pgd, such as `fat:objective=(trades:attack=(friendly_pgd:loss=kl,...))`.
        patience_epochs: epochs at which tau grows by 1 from 0.
    """

    objective: Any = method_field(
        OBJECTIVES, PGDTraining(attack=FriendlyPGD(mode="keep"), statistics="eval", batch_norm="own")
    )
    patience_epochs: tuple[float, ...] = (50.0, 90.0)

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.objective, "attack", None), FriendlyPGD):
            raise ValueError(
                "fat needs an objective whose attack is friendly_pgd, such as pgd:attack=(friendly_pgd:mode=keep)"
            )
        if hasattr(self.objective, "start"):
            name = OBJECTIVES.spell(self.objective).partition(":")[0]
            raise ValueError(f"fat: {name} remembers things from step to step; give an objective that does not")

    @property
    def defaults(self) -> RunDefaults:
        """Those of the objective."""
        defaults: RunDefaults = getattr(self.objective, "defaults", ADVERSARIAL)
        return defaults

    def __call__(self, views: Views) -> dict[str, Tensor]:
        patience = sum(views.epoch >= epoch for epoch in self.patience_epochs)
        terms: dict[str, Tensor] = _with_patience(self.objective, patience)(views)
        return terms


# The same value each time: what was searched in a step is found again by the attack that searched it.
@functools.lru_cache(maxsize=64)
def _with_patience(objective: Any, patience: int) -> Any:
    return dataclasses.replace(objective, attack=dataclasses.replace(objective.attack, patience=patience))
