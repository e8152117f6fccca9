"""Tightness and ReLU balance of fast certified training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from certify.bounds.interval import interval_walk
from certify.op import AnyBox
from certify.ops.affine import Conv2d, Linear
from certify.ops.relu import ReLU
from robust.regularizer import REGULARIZERS
from robust.relu_shrinkage import ShrunkReLU
from robust.views import Bounded, Views, box_around

TOLERANCE = 0.5
SMALLEST_EPS = 1e-6
"""Least radius of a box that is regularised: schedules start at 0, and at radii that float32 hardly tells from it."""


@REGULARIZERS.register("shi")
@dataclass(frozen=True)
class Shi:
    """weight * (1 - eps/eps_final) * (tightness + ReLU balance) until the radius ramp ends (Shi et al. 2021, eq. 8-10).

    The boxes are those of the objective's own interval propagation (SABR's small box for SABR); below a radius of 1e-6,
    and for an objective that propagates none, they take a propagation of their own over the ball's box.

    Args:
        weight: lambda_0; 0.5 on MNIST and CIFAR-10, 0.2 on TinyImageNet and ImageNet64.
    """

    weight: float = 0.5

    needs_boxes: ClassVar[bool] = True

    def __call__(self, views: Views) -> dict[str, Tensor]:
        if views.ramp >= 1:
            return {}
        bounded = _regularized(views)
        boxes = _relu_boxes(bounded)
        share = self.weight * (1 - views.eps_fraction)
        return {
            "tightness": share * tightness(boxes, views.mean(_first_radius(bounded)), views.mean),
            "relu_balance": share * relu_balance(boxes, views.mean),
        }


Mean = Callable[[Tensor], Tensor]
"""Over the entries of all images of the batch."""


def tightness(boxes: list[AnyBox], first_radius: Tensor, mean: Mean = torch.mean) -> Tensor:
    """Mean over layers of max(0, tol - r_0 / r_l) / tol, r the mean radius of a layer's pre-activations."""
    radii = torch.stack([mean((box.ub - box.lb) / 2) for box in boxes])
    return ((TOLERANCE - first_radius / radii.clamp(min=1e-12)).clamp(min=0) / TOLERANCE).mean()


def relu_balance(boxes: list[AnyBox], mean: Mean = torch.mean) -> Tensor:
    """Mean over layers of how unevenly active and inactive neurons share the centres' mean and variance.

    A layer without active or without inactive neurons counts 0.
    """
    return torch.stack([_balance(box, mean) for box in boxes]).mean()


def _balance(box: AnyBox, mean: Mean) -> Tensor:
    center = (box.lb + box.ub) / 2
    active, inactive = (box.lb > 0).to(center.dtype), (box.ub < 0).to(center.dtype)
    spread = (center - mean(center)).square()
    total = center.new_zeros(())
    for above, below in (
        (mean(center * active), -mean(center * inactive)),
        (mean(spread * active), mean(spread * inactive)),
    ):
        usable = (above > 0) & (below > 0)
        # Both branches of where() are differentiated: guard the quotient itself.
        ratio = torch.where(usable, above, 1.0) / torch.where(usable, below, 1.0)
        even = torch.minimum(ratio, 1 / ratio.clamp(min=1e-12))
        total = total + torch.where(usable, (TOLERANCE - even).clamp(min=0) / TOLERANCE, 0.0)
    return total


def _regularized(views: Views) -> Bounded:
    """The propagation that is regularised: the objective's first, or one of its own."""
    eps = views.ball.eps
    is_point = float(eps.max() if isinstance(eps, Tensor) else eps) < SMALLEST_EPS
    if views.bounded and not is_point:
        return views.bounded[0]
    box = box_around(views.x, views.x.new_full((), SMALLEST_EPS), views.ball.pixel_range) if is_point else views.box
    return Bounded(views.snapshot, box, interval_walk(views.snapshot, box)[1])


def _relu_boxes(bounded: Bounded) -> list[AnyBox]:
    nodes = bounded.snapshot.nodes
    places = [node.inputs[0] for node in nodes if isinstance(node.op, ReLU | ShrunkReLU)]
    if not places:
        raise ValueError("shi balances the inputs of ReLU layers, and the network has none; leave it out")
    return [bounded.boxes[place] for place in places]


def _first_radius(bounded: Bounded) -> Tensor:
    """Radius of the input as the first weight layer sees it, that is after normalisation, `[B, ...]`."""
    value = bounded.start
    for node in bounded.snapshot.nodes[1:]:
        if isinstance(node.op, Conv2d | Linear):
            break
        value = node.op.interval(value)
    return value.radius
