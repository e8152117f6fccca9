"""Networks and memories beside the one in training: a frozen teacher, one trained along, an average, past logits.

An objective or regulariser that needs one makes it in its `start(run)` and names it among its `companions()`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from certify.tracing import capture
from robust.active import Active, Moment, RunFacts
from robust.checkpoint import CheckpointError, load, named_network
from robust.model import names_file


class FrozenModel(Active):
    """A trained network in evaluation mode; only gradients in its input flow through it.

    Args:
        path: its checkpoint; one of a user's own network only where the run trains that network, too.

    Raises:
        ValueError: it was trained for other images or classes than the run's.
        CheckpointError: see `robust.checkpoint.load`.
    """

    def __init__(self, path: str, run: RunFacts) -> None:
        named = named_network(Path(path))
        if names_file(named) and named != run.own:
            raise CheckpointError(
                f"{path}: its network is {named}, and no checkpoint makes code run; it can teach the run of the same "
                f"--model {named} only"
            )
        checkpoint = load(Path(path), run.build(named) if names_file(named) else None)
        there = (tuple(checkpoint.settings["input_shape"]), checkpoint.settings["classes"])
        if there != (tuple(run.input_shape), run.classes):
            raise ValueError(
                f"{path}: a network for images {there[0]} and {there[1]} classes; the run has {run.input_shape} and "
                f"{run.classes}"
            )
        device = next(run.model.parameters()).device
        self.model = checkpoint.model.to(device).eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[B, K]`."""
        return self.model(x)


class TrainedAlong(Active):
    """A second network that the run's optimiser trains, in training mode.

    Args:
        model: text of its architecture.
    """

    def __init__(self, model: str, run: RunFacts) -> None:
        self.model = run.build(model).train()
        example = torch.zeros(1, *run.input_shape, device=next(run.model.parameters()).device)
        self.graph = dataclasses.replace(capture(self.model, example), group=run.group)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[B, K]`; moves its running statistics."""
        return self.graph.forward_train(x)[0]

    def parameters(self) -> Sequence[nn.Parameter]:
        return list(self.model.parameters())

    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


class AveragedModel(Active):
    """An exponential moving average of the network in training, to be asked for predictions during the run.

    BatchNorm's running statistics are averaged as the weights are; they are copies, never shared with the network.

    Args:
        decay: weight of the past, per optimiser step.
    """

    def __init__(self, decay: float, run: RunFacts) -> None:
        self.decay = decay
        self.model = copy.deepcopy(run.model).eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` in evaluation mode."""
        return self.model(x)

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        for average, value in zip(self.model.state_dict().values(), moment.model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)

    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


class PastLogits(Active):
    """The logits that every training image had a number of epochs ago.

    Args:
        epochs: how long ago.
    """

    def __init__(self, epochs: int, run: RunFacts) -> None:
        device = next(run.model.parameters()).device
        self.table = torch.full((epochs + 1, run.images, run.classes), torch.nan, device=device)

    def __call__(self, index: Tensor, epoch: float) -> Tensor:
        """Logits `[B, K]` of the images with these numbers; nan where they had none so long ago."""
        return self.table[(int(epoch) + 1) % len(self.table), index.to(self.table.device)]

    def keep(self, index: Tensor, epoch: float, logits: Tensor) -> None:
        """Remember the logits of this epoch."""
        self.table[int(epoch) % len(self.table), index.to(self.table.device)] = logits.detach()

    def state(self) -> dict[str, Tensor]:
        return {"table": self.table}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.table = state["table"].clone()
