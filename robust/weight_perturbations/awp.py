"""Adversarial weight perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from robust.step import BatchLoss
from robust.weight_perturbation import (
    WEIGHT_PERTURBATIONS,
    Offsets,
    Parameters,
    Scope,
    chosen,
    relative_offsets,
)


@WEIGHT_PERTURBATIONS.register("awp")
@dataclass(frozen=True)
class AWP:
    """v_l = gamma |w_l| g_l / |g_l|, layer by layer, g the gradient of the adversarial loss (Wu et al. 2020).

    The length is that of the ball's boundary, as in the authors' code. The optimiser steps at w + v, weight decay
    included, and v is subtracted afterwards. What their proxy network is for, that the first pass leaves the running
    statistics alone, costs no second network here.

    Args:
        gamma: length relative to the weights: 0.005 for TRADES, 0.01 for adversarial training.
        start_epoch: 10 for TRADES; 5 for adversarial training on SVHN, else 0.
        scope, parameters, proxy: layer, weights and true are the paper's. MAIR's form, a different algorithm, is
            global, all and false: one norm over all parameters, and running statistics that move twice.
    """

    gamma: float = 0.005
    start_epoch: float = 0.0
    scope: Scope = "layer"
    parameters: Parameters = "weights"
    proxy: bool = True

    restore: ClassVar[Literal["after_step", "before_step"]] = "after_step"

    @property
    def statistics_follow(self) -> Literal["perturbed", "unperturbed", "both"]:
        return "perturbed" if self.proxy else "both"

    def __call__(self, model: nn.Module, loss: BatchLoss) -> Offsets:
        moved = chosen(model, self.parameters)
        gradients = loss.gradients(moved, move_statistics=not self.proxy)
        return relative_offsets(moved, gradients, self.gamma, self.scope)
