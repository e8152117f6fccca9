"""Cosine decay with linear warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robust.schedule import SCHEDULES


@SCHEDULES.register("cosine")
@dataclass(frozen=True)
class Cosine:
    """Linear from 0 to 1 over the first `warmup` epochs, then half a cosine down to `final`.

    Source: Loshchilov & Hutter 2017.
    """

    warmup: float = 0.0
    final: float = 0.0

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < self.warmup:
            return epoch / self.warmup
        share = (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
