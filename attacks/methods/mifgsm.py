"""Momentum iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.ascent import Ascent, Keep, Task, ascend
from attacks.attack import ATTACKS
from attacks.gradient import Precision
from attacks.losses import cross_entropy
from attacks.mode import Mode, Model, attack_mode
from attacks.threat import Ball


@ATTACKS.register("mifgsm")
@dataclass(frozen=True)
class MIFGSM:
    """Steps along an accumulated gradient, from the clean point.

    Needs: gradients in the input. Returns: see `keep`. Made for transfer: points crafted on one model carry over to
    others better than those of PGD; on the model itself it is not stronger than PGD. It uses no noise.

    Args:
        steps, step_size: number of steps and their length in units of eps; None is 1 / steps.
        momentum: weight of the former directions; each gradient enters with L1 length 1.
        keep: see Ascent; "last" for transfer.
        mode, precision, seed: see PGD.

    Source: Dong et al. (2018).
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    keep: Keep = "last"
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        step_size = 1 / max(self.steps, 1) if self.step_size is None else self.step_size
        plan = Ascent(self.steps, step_size, keep=self.keep, momentum=self.momentum, precision=self.precision)
        with attack_mode(model, self.mode):
            return ascend(model, cross_entropy, Task(x, (y,), ball), x.detach().clone(), plan)[0]
