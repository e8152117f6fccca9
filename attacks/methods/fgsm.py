"""Fast gradient sign method: a single step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.ascent import Ascent, Task, ascend
from attacks.attack import ATTACKS, noise_of
from attacks.gradient import Precision
from attacks.losses import LOSSES
from attacks.methods.pgd import start_points
from attacks.mode import Mode, Model, attack_mode
from attacks.region import region_around
from attacks.threat import Ball


@ATTACKS.register("fgsm")
@dataclass(frozen=True)
class FGSM:
    """Fast gradient sign method: one step of size eps, along the gradient's sign (Linf) or the gradient (L2, L1).

    Needs: gradients in the input. Returns: the end of the step, whether it fools the model or not. Meant for training
    and as a probe: where it beats an iterated attack, the gradients are masked.

    Args:
        step_size: length of the step in units of eps. start: "clean", or "uniform" in the ball (FGSM-RS, usually with
            step_size=1.25).
        loss, mode, precision, seed: see PGD.

    Source: Goodfellow et al. (2015); random start: Wong et al. (2020).
    """

    step_size: float = 1.0
    start: Literal["uniform", "gaussian", "clean"] = "clean"
    loss: Literal["cross_entropy", "margin", "dlr"] = "cross_entropy"
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
        pace: Tensor | None = None,
    ) -> Tensor:
        """See `Attack`; `pace` multiplies the step of every example, `[B]`."""
        region = region_around(x, ball)
        region = region if pace is None else region.paced(pace)
        start = start_points(self.start, x, region, noise_of(self.seed, x, generator, index)(None, 0))
        plan = Ascent(steps=1, step_size=self.step_size, keep="last", precision=self.precision)
        with attack_mode(model, self.mode):
            return ascend(model, LOSSES[self.loss], Task(x, (y,), ball), start, plan, region)[0]
