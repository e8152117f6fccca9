"""Straight ramp."""

from __future__ import annotations

from dataclasses import dataclass

from robust.schedule import SCHEDULES, check_ramp, ramp_progress


@SCHEDULES.register("linear")
@dataclass(frozen=True)
class Linear:
    """`initial` until epoch `start`, then a straight line to 1 at epoch `end` (Gowal et al. 2018; CROWN-IBP).

    Args:
        initial: factor at the start; above 0 in l2-certified training (Hu et al. 2023).
    """

    start: float = 0.0
    end: float = 20.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_ramp("linear", self.start, self.end)

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return self.initial + (1 - self.initial) * ramp_progress(self, step, steps_per_epoch)
