"""Exponential moving average of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robust.active import Active, Moment, RunFacts
from robust.hook import HOOKS


@HOOKS.register("ema")
@dataclass(frozen=True)
class EMA:
    """Weights averaged with weight (1 - decay) on the newest, judged and kept in place of the trained ones.

    Source: Polyak & Juditsky 1992. The form of Gowal et al. 2020 and Wang et al. 2023 is
    `ema:decay=0.995,start_epoch=E,warmup=true,batch_norm=copy`, E being 2.5 % of the epochs; CFA's is
    `ema:decay=0.88,every=epoch`.

    Args:
        decay: per update. start_epoch: epoch from which to average.
        warmup: the n-th update from then on, n counted from 0, decays by min(decay, (1 + n) / (10 + n)).
        every: an update behind each optimiser step, or behind each epoch.
        batch_norm: running statistics beside the averaged weights. reestimate: estimated for them over the training
            images. copy: the network's own at the end of the epoch. average: averaged as the weights are.
    """

    decay: float = 0.999
    start_epoch: float = 0.0
    warmup: bool = False
    every: Literal["step", "epoch"] = "step"
    batch_norm: Literal["reestimate", "copy", "average"] = "reestimate"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema: decay={self.decay}: expected a share in [0, 1)")

    def start(self, run: RunFacts) -> Active:
        return _Active(self)


class _Active(Active):
    averages = True

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}

    def after_step(self, moment: Moment) -> None:
        if self.ema.every == "step":
            self._update(moment)

    def after_epoch(self, moment: Moment) -> None:
        if self.ema.every == "epoch":
            self._update(moment)
        if self.ema.batch_norm == "copy":
            self.statistics = {name: buffer.clone() for name, buffer in _statistics(moment.model).items()}

    @torch.no_grad()
    def _update(self, moment: Moment) -> None:
        if moment.epoch < self.ema.start_epoch:
            if self.ema.warmup:
                # The first update averages with the weights before it.
                self.average = {name: p.detach().clone() for name, p in moment.model.named_parameters()}
            return
        decay = self.ema.decay
        if self.ema.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        _follow(self.average, dict(moment.model.named_parameters()), decay)
        if self.ema.batch_norm == "average":
            _follow(self.statistics, _statistics(moment.model), decay)

    def weights(self) -> dict[str, Tensor] | None:
        return {**self.average, **self.statistics} if self.average else None

    def state(self) -> dict[str, Tensor]:
        return {
            "updates": torch.tensor(self.updates),
            **{f"average.{name}": tensor for name, tensor in self.average.items()},
            **{f"statistics.{name}": tensor for name, tensor in self.statistics.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        self.average, self.statistics = (
            {name.removeprefix(kind): t.clone() for name, t in state.items() if name.startswith(kind)}
            for kind in ("average.", "statistics.")
        )


def _follow(average: dict[str, Tensor], newest: dict[str, Tensor], decay: float) -> None:
    for name, value in newest.items():
        if name in average and value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name] = value.detach().clone()


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's buffers by name."""
    return {
        f"{place}.{name}": buffer
        for place, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for name, buffer in layer.named_buffers(recurse=False)
    }
