"""Robust weight perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from robust.step import BatchLoss
from robust.weight_perturbation import WEIGHT_PERTURBATIONS, Offsets, Perturbed, chosen, relative_offsets


@WEIGHT_PERTURBATIONS.register("rwp")
@dataclass(frozen=True)
class RWP:
    """AWP that only examples of small loss drive, the loss stationary condition (Yu et al. 2022).

    Repeats: the gradient of mean_i 1(l_i < max_loss) l_i at w + v is added to a sum, and v is that sum at the length
    gamma |w|, one norm over all weights. Where no example qualifies, nothing is added. The optimiser steps at w + v.
    l_i is the example's whole loss; the authors' code for TRADES does not run (its shapes do not fit).

    Args:
        gamma: length relative to the weights: 0.01 for adversarial training, 0.005 for TRADES.
        max_loss: c_min; 1.7 on CIFAR-10 and SVHN, 4.0 on CIFAR-100.
        iterations: gradients per step. start_epoch: 0 for adversarial training (5 on SVHN), 10 for TRADES.
    """

    gamma: float = 0.01
    max_loss: float = 1.7
    iterations: int = 10
    start_epoch: float = 0.0

    restore: ClassVar[Literal["after_step", "before_step"]] = "after_step"
    statistics_follow: ClassVar[Literal["perturbed", "unperturbed", "both"]] = "perturbed"

    def __call__(self, model: nn.Module, loss: BatchLoss) -> Offsets:
        moved = chosen(model, "weights")
        total = [torch.zeros_like(parameter) for parameter in moved]
        offsets: Offsets = []
        for _ in range(self.iterations):
            perturbed = Perturbed(offsets, "before_step")
            gradients = loss.gradients(moved, keep=lambda losses: (losses < self.max_loss).to(losses))
            perturbed.restore("before_step")
            torch._foreach_add_(total, gradients)
            offsets = relative_offsets(moved, total, self.gamma, "global")
        return offsets
