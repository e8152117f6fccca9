"""Stepwise decay of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from robust.schedule import SCHEDULES


@SCHEDULES.register("milestones")
@dataclass(frozen=True)
class Milestones:
    """Multiplied by `factor` at the start of each epoch in `at` (epochs counted from 0: at=50 lowers epoch 50 on)."""

    at: tuple[float, ...] = ()
    factor: float = 0.2

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return self.factor ** sum(step >= epoch * steps_per_epoch for epoch in self.at)
