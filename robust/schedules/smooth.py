"""The ramp of fast certified training."""

from __future__ import annotations

from dataclasses import dataclass

from robust.schedule import SCHEDULES, check_ramp


@SCHEDULES.register("smooth")
@dataclass(frozen=True)
class Smooth:
    """0 until epoch `start`, a power curve over the first part of the ramp, then a straight line to 1 at epoch `end`.

    The slopes agree where the two meet. Counted in whole optimiser steps, as the sources do: the curve ends at step
    `int(middle * (T - s)) + s` of a ramp from step s to step T.
    Source: Xu et al. 2020 (auto_LiRPA), used by Shi et al. 2021 and all that build on them.

    Args:
        start, end: epochs between which the radius grows.
        middle: share of the ramp that is curved.
        power: of the curve.
    """

    start: float = 0.0
    end: float = 20.0
    middle: float = 0.25
    power: float = 4.0

    def __post_init__(self) -> None:
        check_ramp("smooth", self.start, self.end)

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        first, last = round(self.start * steps_per_epoch), round(self.end * steps_per_epoch)
        if step >= last:
            return 1.0
        if step <= first:
            return 0.0
        turn = int(self.middle * (last - first)) + first
        if turn == first:
            return (step - first) / (last - first)  # too short a ramp for a curve
        scale = (turn - first) ** (self.power - 1)
        unit = 1 / ((last - turn) * self.power * scale + (turn - first) * scale)
        if step < turn:
            return unit * (step - first) ** self.power
        at_turn = unit * (turn - first) ** self.power
        return at_turn + (1 - at_turn) * (step - turn) / (last - turn)
