"""Exponential moving average of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.active import Active, Moment, RunFacts
from robust.hook import HOOKS


@HOOKS.register("ema")
@dataclass(frozen=True)
class EMA:
    """Weights averaged with weight (1 - decay) on the newest, judged and kept in place of the trained ones.

    BatchNorm statistics are re-estimated for the averaged weights. Source: Polyak & Juditsky 1992.

    Args:
        decay: per optimiser step. start_epoch: epoch from which to average.
    """

    decay: float = 0.999
    start_epoch: float = 0.0

    def start(self, run: RunFacts) -> Active:
        return _Active(self)


class _Active(Active):
    averages = True

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        if moment.epoch < self.ema.start_epoch:
            return
        for name, parameter in moment.model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter, 1 - self.ema.decay)
            else:
                self.average[name] = parameter.detach().clone()

    def weights(self) -> dict[str, Tensor] | None:
        return self.average or None

    def state(self) -> dict[str, Tensor]:
        return dict(self.average)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.average = {name: tensor.clone() for name, tensor in state.items()}
