"""SAF and MESA: sharpness-aware training for free, by agreement with the network's own past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.losses import kl_to_reference
from robust.active import Active, Moment, RunFacts
from robust.auxiliary import AveragedModel, PastLogits
from robust.regularizer import REGULARIZERS
from robust.views import Views


@REGULARIZERS.register("saf")
@dataclass(frozen=True)
class SAF:
    """weight T^2 KL(softmax(past / T) || softmax(z(x) / T)), past the logits that the image had some epochs ago
    (Du et al. 2022).

    They are those of the training pass of that time, augmentation and all. Costs a table of logits, and no pass where
    the objective has a clean one.

    Args:
        weight: lambda. temperature: T.
        start_epoch: from which it acts. epochs_back: how old the logits are.
    """

    weight: float = 0.3
    temperature: float = 5.0
    start_epoch: float = 5.0
    epochs_back: int = 2

    def start(self, run: RunFacts) -> Active:
        return _SAF(self, PastLogits(self.epochs_back, run))


class _SAF(Active):
    needs_boxes: ClassVar[bool] = False

    def __init__(self, saf: SAF, past: PastLogits) -> None:
        self.saf, self.past = saf, past

    def companions(self) -> list[Active]:
        return [self.past]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        clean = views.clean
        if views.epoch < self.saf.start_epoch:
            return {"saf": clean.new_zeros(())}
        assert views.index is not None
        past = self.past(views.index, views.epoch)
        known = ~past.isnan().any(1)
        agreement = tempered_divergence(torch.where(known[:, None], past, 0.0), clean, self.saf.temperature)
        return {"saf": self.saf.weight * (known * agreement).mean()}

    def see(self, views: Views, moment: Moment) -> None:
        assert views.index is not None
        self.past.keep(views.index, views.epoch, views.clean)


@REGULARIZERS.register("mesa")
@dataclass(frozen=True)
class MESA:
    """weight T^2 KL(softmax(average(x) / T) || softmax(z(x) / T)), the average of the weights' past (Du et al. 2022).

    SAF without a table: the past is an exponential moving average, asked in evaluation mode.

    Args:
        weight: lambda. temperature: T.
        start_epoch: from which it acts. decay: of the average, per step.
    """

    weight: float = 0.8
    temperature: float = 5.0
    start_epoch: float = 5.0
    decay: float = 0.9998

    def start(self, run: RunFacts) -> Active:
        return _MESA(self, AveragedModel(self.decay, run))


class _MESA(Active):
    needs_boxes: ClassVar[bool] = False

    def __init__(self, mesa: MESA, average: AveragedModel) -> None:
        self.mesa, self.average = mesa, average

    def companions(self) -> list[Active]:
        return [self.average]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        clean = views.clean
        if views.epoch < self.mesa.start_epoch:
            return {"mesa": clean.new_zeros(())}
        past = views.once("mesa", lambda: self.average(views.x))
        return {"mesa": self.mesa.weight * tempered_divergence(past, clean, self.mesa.temperature).mean()}


def tempered_divergence(past: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(past / T) || softmax(logits / T)), `[B]`."""
    no_label = logits.new_zeros(len(logits), dtype=torch.int64)
    return temperature**2 * kl_to_reference(logits / temperature, no_label, past / temperature)
