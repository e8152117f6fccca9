"""What attacks of other packages need to keep the promises of ours."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from attacks.gradient import Precision, forward
from attacks.mode import Model
from attacks.registry import number
from attacks.threat import Ball


class Pixels(nn.Module):
    """The model as packages want it: a module with a device, whose modes are no concern of theirs."""

    def __init__(self, model: Model, like: Tensor, precision: Precision) -> None:
        super().__init__()
        self.device_of_inputs = nn.Parameter(like.new_zeros(()), requires_grad=False)
        # In a tuple, so that the package, which sets the mode of the modules that it finds, does not find it.
        self.inside = (model,)
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        return forward(self.inside[0], x, self.precision)


def option_of(text: str, attack: str, parameters: Mapping[str, inspect.Parameter]) -> tuple[str, Any]:
    """(parameter, value) of "steps=20", the value in the type of the parameter's default.

    Args:
        attack: whose parameters they are, for messages.
    """
    key, _, value = text.partition("=")
    if key not in parameters:
        raise ValueError(f"{attack} has no parameter {key!r}; it has: {', '.join(parameters) or 'none'}")
    default = parameters[key].default
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ValueError(f"{attack}, {key}: expected true or false, got {value!r}")
        return key, value == "true"
    if isinstance(default, int) and value.lstrip("-").isdigit():
        return key, int(value)
    return key, number(value) if isinstance(default, int | float) else value


def moved_inside(points: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """The points, those outside the ball projected into it."""
    inside = ball.contains(points, x).view((-1,) + (1,) * (x.dim() - 1))
    return torch.where(inside, points, ball.project(points, x))


@contextlib.contextmanager
def private_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Global noise of torch, numpy and Python that depends on the seed alone, and is afterwards as it was before."""
    # numpy's old global stream is the one that the package draws from.
    others = numpy.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        numpy.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            numpy.random.set_state(others[0])  # noqa: NPY002
            random.setstate(others[1])
