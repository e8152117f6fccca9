"""Sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from robust.step import BatchLoss
from robust.weight_perturbation import WEIGHT_PERTURBATIONS, Offsets, chosen, norm_of


@WEIGHT_PERTURBATIONS.register("sam")
@dataclass(frozen=True)
class SAM:
    """e = rho g / |g| with one norm over all parameters; the optimiser steps at w with the gradient of w + e.

    Running statistics follow the first pass. With adversarial training both passes see the points found at w.
    Source: Foret et al. 2021; adaptive: Kwon et al. 2021, e = rho w^2 g / | |w| g | (elementwise).

    Args:
        rho: radius; 0.05, and 2.0 for the adaptive form.
    """

    rho: float = 0.05
    adaptive: bool = False
    start_epoch: float = 0.0

    restore: ClassVar[Literal["after_step", "before_step"]] = "before_step"
    statistics_follow: ClassVar[Literal["perturbed", "unperturbed", "both"]] = "unperturbed"

    def __call__(self, model: nn.Module, loss: BatchLoss) -> Offsets:
        moved = chosen(model, "all")
        gradients = loss.gradients(moved, move_statistics=True)
        scales = [p.detach().abs() if self.adaptive else p.new_ones(()) for p in moved]
        length = norm_of(scale * g for scale, g in zip(scales, gradients, strict=True))
        step = self.rho / (length + 1e-12)
        return [(p, step * scale * scale * g) for p, scale, g in zip(moved, scales, gradients, strict=True)]
