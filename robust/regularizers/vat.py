"""VAT: virtual adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.gradient import differentiate
from attacks.losses import kl_to_reference
from attacks.noise import normal
from attacks.threat import L2Ball
from robust.regularizer import REGULARIZERS
from robust.views import Views


@REGULARIZERS.register("vat")
@dataclass(frozen=True)
class VAT:
    """weight * mean KL(p(x) || p(x + r)), r the direction in which p changes most, of Euclidean length eps
    (Miyato et al. 2018).

    The direction comes from power iterations: d becomes the gradient of KL(p(x) || p(x + xi d)) in d, at length 1. p(x)
    is a constant. Passes have statistics of their own and leave the running ones alone. It needs no labels; the label's
    loss is the objective's (`natural`). x + r is not cut to the pixel range.

    Args:
        weight: alpha. eps: in pixel units; the authors' 8.0 is for whitened CIFAR-10.
        xi: length of the finite difference; the authors' 1e-6 is less than float32's rounding of most pixels, and the
            direction then noise. iterations: of the power method.
        entropy_weight: of the mean entropy of p(x), 1 in the authors' VAT+EntMin.
    """

    weight: float = 1.0
    eps: float = 8.0
    xi: float = 1e-3
    iterations: int = 1
    entropy_weight: float = 0.0

    needs_boxes: ClassVar[bool] = False

    def __call__(self, views: Views) -> dict[str, Tensor]:
        clean = views.clean
        moved = views.x + views.once(("vat", self), lambda: self._direction(views, clean.detach()))
        divergence = kl_to_reference(views.train(moved, move=False), views.y, clean.detach())
        terms = {"vat": self.weight * divergence.mean()}
        if self.entropy_weight:
            log_p = clean.log_softmax(1)
            terms["entropy"] = -self.entropy_weight * (log_p.exp() * log_p).sum(1).mean()
        return terms

    def _direction(self, views: Views, clean: Tensor) -> Tensor:
        unit = L2Ball(self.eps, pixel_range=None)
        d = unit.steepest(normal(views.x.shape, views.x, views.generator), 1.0)
        for _ in range(self.iterations):
            point, labels = views.x + self.xi * d, (views.y, clean)
            gradient = differentiate(lambda x: views.iterate(x, move=False), kl_to_reference, point, labels)[0]
            d = unit.steepest(gradient, 1.0)
        return self.eps * d
