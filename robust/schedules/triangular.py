"""The cyclic schedule of fast training: up and down again, once."""

from __future__ import annotations

from dataclasses import dataclass

from robust.schedule import SCHEDULES


@SCHEDULES.register("triangular")
@dataclass(frozen=True)
class Triangular:
    """A straight line from 0 to 1 over the share `peak` of the run's steps, and a straight line back to 0.

    Source: Smith & Topin 2018; 0.5 in Wong et al. 2020, 0.4 in Andriushchenko & Flammarion 2020.
    """

    peak: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1:
            raise ValueError(f"triangular: peak={self.peak}: expected a share of the run between 0 and 1")

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        # The first step's factor would be 0: it is counted at its end, as the last one's is not quite 0 either.
        share = (step + 1) / (steps_per_epoch * epochs + 1)
        return min(share / self.peak, (1 - share) / (1 - self.peak))
