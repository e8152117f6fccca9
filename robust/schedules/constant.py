"""No schedule."""

from __future__ import annotations

from dataclasses import dataclass

from robust.schedule import SCHEDULES


@SCHEDULES.register("constant")
@dataclass(frozen=True)
class Constant:
    """1 throughout."""

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return 1.0
