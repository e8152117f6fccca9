"""GradAlign: input gradients that agree inside the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.noise import uniform
from robust.objective import cross_entropy
from robust.regularizer import REGULARIZERS
from robust.views import Views


@REGULARIZERS.register("grad_align")
@dataclass(frozen=True)
class GradAlign:
    """weight * (1 - mean cosine of the gradients of the cross-entropy in the input, at x and at x + u), u uniform
    within eps of every pixel (Andriushchenko & Flammarion 2020).

    Differentiated twice, through the gradient at x + u only, as in the authors' code for FGSM; examples with a gradient
    of 0 are left out. Both passes are in training mode; that at x + u moves the running statistics.

    Args:
        weight: 0.2 is the authors' at 8/255 on CIFAR-10; it grows with the radius.
    """

    weight: float = 0.2

    needs_boxes: ClassVar[bool] = False

    def __call__(self, views: Views) -> dict[str, Tensor]:
        if views.ball.norm != "linf":
            raise ValueError(
                f"grad_align draws noise of the radius in every pixel: it needs norm=linf, got {views.ball.norm}"
            )
        x, eps = views.x, views.ball.eps_of(views.x)
        noise = views.once("grad_align", lambda: eps * (2 * uniform(x.shape, x, views.generator) - 1))
        fixed = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(cross_entropy(views.iterate(fixed, move=False), views.y).sum(), fixed)
        moved = (x + noise).detach().requires_grad_()
        loss = cross_entropy(views.train(moved), views.y).sum()
        (second,) = torch.autograd.grad(loss, moved, create_graph=True)
        return {"grad_align": self.weight * (1 - mean_cosine(first, second))}


def mean_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Mean cosine over the examples `[B, ...]` of which neither vector is 0; 1 where none is left."""
    first, second = first.flatten(1), second.flatten(1)
    some = (first != 0).any(1) & (second != 0).any(1)
    if not some.any():
        return first.new_ones(())
    first, second = first[some], second[some]
    return ((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))).mean()
