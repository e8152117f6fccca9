"""FOMO: forgetting against robust overfitting."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attacks.losses import kl_to_reference
from robust.active import Active, Moment, RunFacts
from robust.auxiliary import AveragedModel
from robust.regularizer import REGULARIZERS
from robust.views import Views


@REGULARIZERS.register("fomo")
@dataclass(frozen=True)
class FOMO:
    """Every few epochs, but behind the last, a random share of the weights is drawn anew, and relearnt in agreement
    with a stable average: weight * mean KL(p_stable(x_adv) || p(x_adv)) (Ramkumar et al. 2024); unreproduced: every
    constant, the form of the consistency loss and the order of the phases are not published.

    The stable network is an exponential moving average of the weights, in evaluation mode. Weights of convolutional and
    dense layers are forgotten; their fresh values come from the layers' own initialisation.

    Args:
        weight: of the consistency loss. decay: of the average, per step.
        start_epoch: behind which weights are forgotten for the first time; the loss acts from then on.
        every: epochs between two times. share: of the weights.
        seed: of what is forgotten and drawn.
    """

    weight: float = 1.0
    decay: float = 0.999
    start_epoch: int = 100
    every: int = 5
    share: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.share <= 1:
            raise ValueError(f"expected every >= 1 and 0 <= share <= 1, got {self}")

    def start(self, run: RunFacts) -> Active:
        if self.start_epoch >= run.epochs:
            raise ValueError(
                f"fomo: start_epoch={self.start_epoch} of {run.epochs} epochs forgets nothing; give a smaller one, "
                f"such as fomo:start_epoch={run.epochs // 2}"
            )
        return _Active(self, AveragedModel(self.decay, run), run.epochs)


class _Active(Active):
    needs_boxes: ClassVar[bool] = False

    def __init__(self, fomo: FOMO, stable: AveragedModel, epochs: int) -> None:
        self.fomo, self.stable, self.epochs = fomo, stable, epochs

    def companions(self) -> list[Active]:
        return [self.stable]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        logits = views.adversarial
        if views.epoch < self.fomo.start_epoch:
            return {"consistency": logits.new_zeros(())}
        reference = views.once("stable", lambda: self.stable(views.points))
        return {"consistency": self.fomo.weight * kl_to_reference(logits, views.y, reference).mean()}

    def after_epoch(self, moment: Moment) -> None:
        epoch = round(moment.epoch)
        # What is forgotten behind the last epoch would never be learnt again.
        if self.fomo.start_epoch <= epoch < self.epochs and (epoch - self.fomo.start_epoch) % self.fomo.every == 0:
            forget_(moment.model, self.fomo.share, self.fomo.seed + epoch)


@torch.no_grad()
def forget_(model: nn.Module, share: float, seed: int) -> None:
    """Draw a random `share` of the convolutional and dense weights anew, each layer from its own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fresh: Any = copy.deepcopy(layer).cpu()
                fresh.reset_parameters()
                chosen = torch.rand(layer.weight.shape) < share
                layer.weight.copy_(torch.where(chosen, fresh.weight, layer.weight.cpu()))
