"""Registry of hooks: things that happen at moments of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from attacks.registry import Registry

HOOKS = Registry("hook", "robust.hooks")


@dataclass
class Moment:
    """What a hook sees of the run.

    Attributes:
        model: the network in training.
        step: optimiser steps done. epoch: steps done over steps per epoch.
        batches: a call passes over the training images once, augmented: `[B, C, H, W]` batches.
    """

    model: nn.Module
    step: int
    epoch: float
    batches: Callable[[], Iterator[Tensor]]


class Active:
    """A hook at work in one run; its state is saved with the run, so that a killed run goes on as it was.

    Attributes:
        averages: whether `weights` may have an opinion; only one hook of a run may.
    """

    averages: ClassVar[bool] = False

    def after_step(self, moment: Moment) -> None:
        """Called behind every optimiser step."""

    def after_epoch(self, moment: Moment) -> None:
        """Called behind every epoch, before validation."""

    def weights(self) -> dict[str, Tensor] | None:
        """Parameters to judge and keep instead of the trained ones, by name; None for no opinion."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors that `restore` needs."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from the tensors of `state`."""


class Hook(Protocol):
    """Frozen dataclass of hyper-parameters."""

    def start(self, model: nn.Module) -> Active:
        """The hook at work in a new run."""
        ...
