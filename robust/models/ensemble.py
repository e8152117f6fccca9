"""Several networks of one architecture, answering together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from attacks.registry import method_field
from robust.layers import Shape
from robust.model import MODELS, Architecture
from robust.models.cnn3 import CNN3


class Ensemble(nn.Module):
    """The mean of the members' logits.

    Logits rather than probabilities, whose mean is the usual answer of an ensemble: this way it has bounds.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (member(x) for member in self.members)
        for logits in others:
            first = first + logits
        return first / len(self.members)


@MODELS.register("ensemble")
@dataclass(frozen=True)
class EnsembleOf:
    """Networks of the architecture `model` with different starting weights; the mean of their logits.

    Args:
        model: architecture. members: number of networks.
    """

    model: Architecture = method_field(MODELS, CNN3())
    members: int = 3

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"ensemble: members={self.members}: expected at least 1")

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
        return Ensemble([self.model(input_shape, classes, mean, std) for _ in range(self.members)])
