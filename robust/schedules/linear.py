"""Straight ramp."""

from __future__ import annotations

from dataclasses import dataclass

from robust.schedule import SCHEDULES, ramp_progress


@SCHEDULES.register("linear")
@dataclass(frozen=True)
class Linear:
    """0 until epoch `start`, then a straight line to 1 at epoch `end` (Gowal et al. 2018; CROWN-IBP)."""

    start: float = 0.0
    end: float = 20.0

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return ramp_progress(self, step, steps_per_epoch)
