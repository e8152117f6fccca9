"""A method at work in one run: what it sees of the run, when it is called, and the state that is saved with the run.

Methods are frozen values. One that needs to remember something, or to own a second network, has `start(run)`, which
returns an `Active`; the trainer then uses that in the method's place. This holds for hooks, objectives, regularisers,
weightings and weight perturbations alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from attacks.threat import Ball, LinfBall

if TYPE_CHECKING:
    from robust.views import Views


@dataclass(frozen=True)
class RunFacts:
    """What a method is told of the run before its first step.

    Attributes:
        model: the network in training, with its starting weights.
        input_shape: (C, H, W). classes: number of logits. images: number of training images.
        epochs, steps_per_epoch: of the run.
        build: a call makes another network of a model's text (such as "preactresnet18"), for the same images and
            classes, on the run's device.
        ball: threat model of training at the full radius.
        group: processes that train together, each with a part of every batch; None for one process.
        objective: of the run, as a value; None outside of a run.
        own: text of the network in training where it is the user's own, FILE.py:NAME. `build` runs the file that a
            text names, so a text that a checkpoint gives is built only where it is this one.
    """

    model: nn.Module
    input_shape: tuple[int, int, int]
    classes: int
    images: int
    epochs: int
    steps_per_epoch: int
    build: Callable[[str], nn.Module]
    ball: Ball = LinfBall(0.0)
    group: dist.ProcessGroup | None = None
    own: str | None = None
    objective: Any = None


@dataclass
class Moment:
    """What an active method sees of the run.

    Attributes:
        model: the network in training.
        step: optimiser steps done. epoch: steps done over steps per epoch.
        batches: a call passes over the training images once, augmented: `[B, C, H, W]` batches.
        labelled: the same with labels: (x, y).
        held_out: a call passes over the validation images: (x, y); nothing where there are none.
    """

    model: nn.Module
    step: int
    epoch: float
    batches: Callable[[], Iterator[Tensor]]
    labelled: Callable[[], Iterator[tuple[Tensor, Tensor]]] = lambda: iter(())
    held_out: Callable[[], Iterator[tuple[Tensor, Tensor]]] = lambda: iter(())


class Active:
    """A method at work in one run; its state is saved with the run, so that a killed run goes on as it was.

    Attributes:
        averages: whether `weights` may have an opinion; only one method of a run may.
        goes_back: whether it may put earlier weights back, which no average knows of.
    """

    averages: ClassVar[bool] = False
    goes_back: ClassVar[bool] = False

    def companions(self) -> Sequence[Active]:
        """Other active methods that this one owns (teachers, memories); they are called and saved as it is."""
        return ()

    def parameters(self) -> Sequence[nn.Parameter]:
        """Parameters of its own that the run's optimiser trains along."""
        return ()

    def see(self, views: Views, moment: Moment) -> None:
        """Called without gradients behind the loss of every step, before the weights move.

        A batch that is computed in parts is seen part by part. Under a weight perturbation the views are those at the
        perturbed weights.
        """

    def after_step(self, moment: Moment) -> None:
        """Called behind every optimiser step."""

    def after_epoch(self, moment: Moment) -> None:
        """Called behind every epoch, before validation."""

    def finished(self) -> bool:
        """Whether the run ends behind this epoch, before its time."""
        return False

    def weights(self) -> dict[str, Tensor] | None:
        """Parameters to judge and keep instead of the trained ones, by name; None for no opinion.

        BatchNorm's running statistics may be among them; else they are re-estimated for these weights.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors that `restore` needs."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from the tensors of `state`."""


def begin(method: Any, run: RunFacts) -> Any:
    """The method as the run uses it: what its `start` returns, itself where it has none."""
    return method.start(run) if hasattr(method, "start") else method


def active_among(methods: Sequence[Any]) -> list[Active]:
    """The active ones, each followed by its companions."""
    found: list[Active] = []
    for method in methods:
        if isinstance(method, Active):
            found += [method, *active_among(method.companions())]
    return found
