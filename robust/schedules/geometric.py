"""Geometric ramp or decay."""

from __future__ import annotations

from dataclasses import dataclass

from robust.schedule import SCHEDULES, check_ramp, ramp_progress


@SCHEDULES.register("geometric")
@dataclass(frozen=True)
class Geometric:
    """`initial` until epoch `start`, then by equal ratios per step to `final` at epoch `end` (Leino et al. 2021).

    Up for a radius (from 0.01 to 1), down for a learning rate (from 1 to 0.001).
    """

    start: float = 0.0
    end: float = 20.0
    initial: float = 0.01
    final: float = 1.0

    def __post_init__(self) -> None:
        check_ramp("geometric", self.start, self.end)
        if min(self.initial, self.final) <= 0:
            raise ValueError(f"geometric: equal ratios need positive ends, got {self.initial} and {self.final}")

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return self.initial * (self.final / self.initial) ** ramp_progress(self, step, steps_per_epoch)
