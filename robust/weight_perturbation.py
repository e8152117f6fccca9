"""Registry of weight perturbations: the gradient of a step is taken at weights moved to where the loss is larger.

A step is: attack at the weights w; the perturbation asks the loss for gradients and returns offsets v; the loss's
gradient is taken at w + v; then, as the method says, the optimiser moves w + v and v is taken off again (AWP), or w is
restored first and the optimiser moves w (SAM).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from attacks.registry import Registry
from robust.step import BatchLoss

WEIGHT_PERTURBATIONS = Registry("weight perturbation", "robust.weight_perturbations")

Offsets = list[tuple[nn.Parameter, Tensor]]
Scope = Literal["layer", "global"]
Parameters = Literal["weights", "all"]
"""weights: those of more than one dimension, that is convolutions and dense layers. all: biases and BatchNorm too."""


class WeightPerturbation(Protocol):
    """Frozen dataclass of hyper-parameters.

    Attributes:
        start_epoch: epochs before which the weights are left alone.
        restore: when the weights come back. after_step: the offsets are subtracted from what the optimiser made of the
            perturbed weights. before_step: the weights are put back first, bit by bit.
        statistics_follow: which pass moves BatchNorm's running statistics: that of the gradient at the perturbed
            weights, that of the unperturbed weights, or both.
    """

    start_epoch: float
    restore: ClassVar[Literal["after_step", "before_step"]]

    @property
    def statistics_follow(self) -> Literal["perturbed", "unperturbed", "both"]: ...

    def __call__(self, model: nn.Module, loss: BatchLoss) -> Offsets:
        """What to add to the parameters; the model's weights and running statistics as they were found."""
        ...


class Perturbed:
    """The weights with offsets added; `restore` takes them off, at one of two moments.

    Args:
        when: see WeightPerturbation.restore.
    """

    def __init__(self, offsets: Offsets, when: Literal["after_step", "before_step"]) -> None:
        self.offsets, self.when = offsets, when
        # Adding and subtracting rounds; weights that the optimiser must find unperturbed are put back as they were.
        self.originals = [p.detach().clone() for p, _ in offsets] if when == "before_step" else []
        move(offsets)

    def restore(self, now: Literal["after_step", "before_step"]) -> None:
        """Take the offsets off where this is the method's moment."""
        if now != self.when:
            return
        if now == "after_step":
            move(self.offsets, -1.0)
            return
        with torch.no_grad():
            for (parameter, _), original in zip(self.offsets, self.originals, strict=True):
                parameter.copy_(original)


@torch.no_grad()
def move(offsets: Offsets, sign: float = 1.0) -> None:
    """Add the offsets to the parameters, or subtract them (sign -1)."""
    for parameter, offset in offsets:
        parameter.add_(offset, alpha=sign)


def chosen(model: nn.Module, parameters: Parameters) -> list[nn.Parameter]:
    """Parameters that are perturbed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if p.dim() > 1] if parameters == "weights" else trained


def relative_offsets(
    parameters: Sequence[nn.Parameter], directions: Sequence[Tensor], gamma: float, scope: Scope
) -> Offsets:
    """Directions at the length gamma |w|, tensor by tensor or all together; a direction that is 0 stays 0."""
    pairs = list(zip(parameters, directions, strict=True))
    groups = [[pair] for pair in pairs] if scope == "layer" else [pairs]
    offsets: Offsets = []
    for group in groups:
        scale = gamma * norm_of(p.detach() for p, _ in group) / (norm_of(d for _, d in group) + 1e-20)
        offsets += [(parameter, direction * scale) for parameter, direction in group]
    return offsets


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all entries."""
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).norm()
