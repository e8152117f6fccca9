"""Precise BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass

from robust.active import Active, Moment, RunFacts
from robust.batch_norm import has_batch_norm, reestimate_statistics
from robust.hook import HOOKS


@HOOKS.register("precise_bn")
@dataclass(frozen=True)
class PreciseBN:
    """After each epoch, running statistics become the average over the training images at the weights of that moment
    (CTBench; the loader's augmentation included). Costs a forward pass over the training images per epoch."""

    def start(self, run: RunFacts) -> Active:
        return _Active()


class _Active(Active):
    def after_epoch(self, moment: Moment) -> None:
        if has_batch_norm(moment.model):
            reestimate_statistics(moment.model, moment.batches())
