"""Stochastic weight averaging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.active import Active, Moment, RunFacts
from robust.hook import HOOKS


@HOOKS.register("swa")
@dataclass(frozen=True)
class SWA:
    """Equal-weight average of the weights seen every few steps, judged and kept in place of the trained ones.

    BatchNorm statistics are re-estimated for the averaged weights. Source: Izmailov et al. 2018; CTBench's use.

    Args:
        start_epoch: epoch from which to average. every: optimiser steps between two samples.
    """

    start_epoch: float = 0.0
    every: int = 10

    def start(self, run: RunFacts) -> Active:
        return _Active(self)


class _Active(Active):
    averages = True

    def __init__(self, swa: SWA) -> None:
        self.swa = swa
        self.average: dict[str, Tensor] = {}
        self.count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        if moment.epoch < self.swa.start_epoch or moment.step % self.swa.every:
            return
        self.count += 1
        for name, parameter in moment.model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter, 1 / int(self.count))
            else:
                self.average[name] = parameter.detach().clone()

    def weights(self) -> dict[str, Tensor] | None:
        return self.average or None

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, **{f"average.{name}": tensor for name, tensor in self.average.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.count = state["count"].clone()
        prefix = "average."
        self.average = {
            name.removeprefix(prefix): tensor.clone() for name, tensor in state.items() if name.startswith(prefix)
        }
