"""Free adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.active import Active, Moment, RunFacts
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("free_at")
@dataclass(frozen=True)
class FreeAT:
    """Cross-entropy at x + delta, every mini-batch `replays` times; the backward pass that trains the weights moves
    delta, too, by a step of length eps (Shafahi et al. 2019).

    delta belongs to a place in the mini-batch and outlives it: a new image starts with its predecessor's, which is cut
    to the new image's pixel range only behind the first replay (as in Wong et al.'s code). An epoch has `replays` times
    as many steps, so a run takes `epochs` = passes / replays.

    Args:
        replays: m.
        batch_norm: BatchNorm statistics of the pass.
    """

    replays: int = 8
    batch_norm: BatchNormOf = "own"

    undivided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.replays < 1:
            raise ValueError(f"free_at: replays={self.replays}: expected at least 1")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        """The loss before any perturbation; a run uses what `start` returns."""
        return self.loss(views, torch.zeros_like(views.x))

    def loss(self, views: Views, delta: Tensor) -> dict[str, Tensor]:
        """Terms at x + delta."""
        return {"adversarial": cross_entropy(adversarial_logits(views, views.x + delta, self.batch_norm), views.y)}

    def start(self, run: RunFacts) -> Active:
        device = next(run.model.parameters()).device
        return _Active(self, torch.zeros(0, *run.input_shape, device=device))


class _Active(Active):
    """Free adversarial training in a run.

    Attributes:
        delta: of every place in a mini-batch, `[B, C, H, W]`; grows to the largest batch.
        used: places that the parts of this step have taken.
    """

    def __init__(self, method: FreeAT, delta: Tensor) -> None:
        self.method, self.delta = method, delta
        self.used = 0

    def __call__(self, views: Views) -> dict[str, Tensor]:
        _, leaf = views.once(self, lambda: self._take(views.x))
        return self.method.loss(views, leaf)

    def _take(self, x: Tensor) -> tuple[slice, Tensor]:
        """The places of the next part of the batch, and their perturbations as a leaf of the gradient."""
        places = slice(self.used, self.used + len(x))
        self.used = places.stop
        missing = places.stop - len(self.delta)
        if missing > 0:
            self.delta = torch.cat([self.delta.to(x), x.new_zeros(missing, *x.shape[1:])])
        return places, self.delta[places].clone().requires_grad_()

    def see(self, views: Views, moment: Moment) -> None:
        places, leaf = views.kept.get(self, (None, None))
        if leaf is None or leaf.grad is None:  # a step at radius 0 takes none
            return
        ball, x = views.ball, views.x
        self.delta[places] = ball.project(x + leaf + ball.steepest(leaf.grad, ball.eps), x) - x

    def after_step(self, moment: Moment) -> None:
        self.used = 0

    def state(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.delta = state["delta"].clone()
