"""Schedules: step -> factor in [0, 1], for the perturbation radius and for the learning rate."""

from __future__ import annotations

from typing import Protocol

from attacks.registry import Registry

SCHEDULES = Registry("schedule", "robust.schedules")


class Schedule(Protocol):
    """Frozen dataclass of epochs; epochs are counted from 0 and may be fractions."""

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Factor in force at optimiser step `step` (counted from 0) of a run of `epochs` epochs."""
        ...


class Ramp(Schedule, Protocol):
    """A schedule that rises from 0 to 1 between two moments."""

    start: float
    end: float


def check_ramp(name: str, start: float, end: float) -> None:
    """ValueError where a ramp begins before the run or ends before it begins; one without length is a jump."""
    if not 0 <= start <= end:
        raise ValueError(f"{name}: start={start:g},end={end:g}: expected epochs with 0 <= start <= end")


def ramp_progress(schedule: Schedule, step: int, steps_per_epoch: int) -> float:
    """Share of the ramp's steps that lie behind, in [0, 1]; 1 for a schedule without a ramp."""
    # In whole steps, as the schedules count, so that the ramp is over exactly when the full radius is reached.
    first, last = (round(getattr(schedule, name, 0.0) * steps_per_epoch) for name in ("start", "end"))
    if step >= last or last <= first:
        return 1.0
    return max(step - first, 0) / (last - first)
