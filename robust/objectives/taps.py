"""TAPS: intervals through the first part of the network, adversarial points in the box between, for the second."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attacks.noise import uniform
from certify.graph import Snapshot
from certify.interval import Interval
from certify.ops.relu import ReLU
from certify.spec import margin_spec, other_classes
from robust.objective import CERTIFIED, OBJECTIVES, RunDefaults, certified_cross_entropy, mixed
from robust.relu_shrinkage import ShrunkReLU, with_shrunk_relus
from robust.views import Views


@dataclass(frozen=True)
class LatentAttack:
    """K - 1 independent sign ascents in a box of hidden neurons, one per margin (Mao et al. 2023, section 3.2).

    Args:
        steps: ascent steps. restarts: independent runs, of which each margin keeps its best point.
    """

    steps: int
    restarts: int

    def __call__(self, classifier: Snapshot, box: Interval, y: Tensor, generator: torch.Generator | None) -> Tensor:
        """Points `[B, K - 1, *shape]` in the box; point t makes the margin to the t-th other class small."""
        lb, ub = box.lb.detach().unsqueeze(1), box.ub.detach().unsqueeze(1)
        (classes,) = classifier.nodes[-1].shape
        spec = margin_spec(y, classes, lb.dtype)
        best, best_value = None, None
        for _ in range(self.restarts):
            size = (len(y), classes - 1, *lb.shape[2:])
            points = torch.addcmul(lb, uniform(size, lb, generator), ub - lb)
            for length in (*self.lengths(), None):
                value, gradient = _margins_and_gradient(classifier, points, spec, gradient=length is not None)
                if best is None or best_value is None:
                    best, best_value = points.clone(), value
                else:
                    better = value < best_value
                    best_value = torch.where(better, value, best_value)
                    best = torch.where(better.view(*better.shape, *[1] * (lb.dim() - 2)), points, best)
                if length is not None:
                    points = torch.addcmul(points, gradient.sign(), ub - lb, value=-length).clamp(lb, ub)
        assert best is not None
        return best

    def lengths(self) -> list[float]:
        """Step lengths as shares of the box's width: max(0.2, 2 / steps), decaying by 0.2 (CTBench's schedule)."""
        if self.steps < 10:
            turns: tuple[float, ...] = ()
        elif self.steps <= 50:
            turns = (0.7,)
        elif self.steps <= 80:
            turns = (0.4, 0.7)
        else:
            turns = (0.3, 0.6, 0.8)
        first = max(0.2, 2 / self.steps)
        passed = [math.floor(turn * self.steps) for turn in turns]
        return [first * 0.2 ** sum(step >= turn for turn in passed) for step in range(self.steps)]


@OBJECTIVES.register("taps")
@dataclass(frozen=True)
class TAPS:
    """L_TAPS * L_IBP: a point in the latent box for every margin, times the sound interval loss (Mao et al. 2023).

    While the radius grows it is plain IBP. The product's gradient through L_TAPS is multiplied by `gradient_scale`.

    Args:
        classifier_relus: ReLUs in the part that is attacked; 1 is the papers' split "17 4" of CNN7-BN, 2 "13 8",
            3 "10 11", 5 "4 17".
        steps, restarts: of the latent attack.
        gradient_scale: weight of the gradient through L_TAPS.
        relu_shrink: as in sabr.
        robust_weight: weight of the term; the rest goes to the clean term.
        ibp_factor: whether L_TAPS is multiplied by L_IBP.
    """

    classifier_relus: int = 1
    steps: int = 20
    restarts: int = 1
    gradient_scale: float = 5.0
    relu_shrink: float = 1.0
    robust_weight: float = 1.0
    ibp_factor: bool = True

    defaults: ClassVar[RunDefaults] = CERTIFIED
    of_the_batch: ClassVar[bool] = True

    def __call__(self, views: Views) -> dict[str, Tensor]:
        return self.over(views, views.box)

    def over(self, views: Views, box: Interval) -> dict[str, Tensor]:
        """The terms for another input box than the whole ball."""
        snapshot = with_shrunk_relus(views.snapshot, self.relu_shrink)
        if views.ramp < 1:
            bounds = certified_cross_entropy(views.margins(box, snapshot), views.y)
            return mixed(views, self.robust_weight, {"ibp": bounds})
        features, classifier = split_before_relus(snapshot, self.classifier_relus)
        latent, _ = views.walk(features, box)
        sound = views.mean(certified_cross_entropy(views.margins(latent, classifier), views.y))
        attack = LatentAttack(self.steps, self.restarts)
        frozen = classifier.without_gradient()
        points = attack(frozen, latent, views.y, views.generator)
        linked = _Connect.apply(points, latent.lb.unsqueeze(1), latent.ub.unsqueeze(1))
        margins = _pointwise_margins(classifier, linked, views.y)
        attacked = views.mean(certified_cross_entropy(margins, views.y))
        attacked = _ScaleGradient.apply(attacked, self.gradient_scale)
        # Powers and products act on batch means, so every example carries the batch's value.
        loss = attacked * sound if self.ibp_factor else attacked
        return mixed(views, self.robust_weight, {"taps": loss.expand(len(views.y))})


def split_before_relus(snapshot: Snapshot, relus: int) -> tuple[Snapshot, Snapshot]:
    """(features, classifier): the classifier begins behind the last ReLU that leaves `relus` of them after it.

    Raises:
        ValueError: the network has too few ReLUs, or a connection skips over the border.
    """
    places = [place for place, node in enumerate(snapshot.nodes) if _is_relu(node.op)]
    if relus < 1 or len(places) <= relus:
        raise ValueError(
            f"classifier_relus={relus}: the model has {len(places)} ReLUs, expected 1 to {len(places) - 1}"
        )
    border = places[-relus - 1]
    later = snapshot.nodes[border + 1 :]
    if any(i < border for node in later for i in node.inputs):
        raise ValueError(
            f"classifier_relus={relus}: a skip connection crosses the split behind {snapshot.nodes[border].name!r}"
        )
    moved = tuple(replace(node, inputs=tuple(i - border for i in node.inputs)) for node in later)
    return Snapshot(snapshot.nodes[: border + 1]), Snapshot((replace(snapshot.nodes[border], inputs=()), *moved))


def _is_relu(op: object) -> bool:
    return isinstance(op, ReLU | ShrunkReLU)


def _margins_and_gradient(classifier: Snapshot, points: Tensor, spec: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Margin t of point t `[B, K - 1]`, and its gradient in the points."""
    with torch.set_grad_enabled(gradient):
        inputs = points.detach().requires_grad_(gradient)
        logits = classifier(inputs.flatten(0, 1)).view(*points.shape[:2], -1)
        value = (logits * spec).sum(-1)
        # The points are independent copies, so one backward pass over their sum gives every gradient.
        slope = torch.autograd.grad(value.sum(), inputs)[0] if gradient else points
    return value.detach(), slope


def _pointwise_margins(classifier: Snapshot, points: Tensor, y: Tensor) -> Tensor:
    """Margins `[B, K]`, 0 in column y: the t-th other class is judged at the t-th point."""
    logits = classifier(points.flatten(0, 1)).view(*points.shape[:2], -1)
    spec = margin_spec(y, logits.shape[-1], logits.dtype)
    values = (logits * spec).sum(-1)
    return logits.new_zeros(len(y), logits.shape[-1]).scatter(1, other_classes(y, logits.shape[-1]), values)


class _Connect(torch.autograd.Function):
    """Gradient connector (Mao et al. 2023, section 3.3, c = 0.5): a point passes its gradient to the end of the box in
    whose half it lies, in full at the end itself and fading towards the middle."""

    TOLERANCE = 1e-5

    @staticmethod
    def forward(ctx: Any, points: Tensor, lb: Tensor, ub: Tensor) -> Tensor:
        ctx.save_for_backward(points, lb, ub)
        return points.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        (grad,) = grads
        points, lb, ub = ctx.saved_tensors
        reach = 0.5 * (ub - lb)
        floor, width = _Connect.TOLERANCE / 2, reach.clamp(min=_Connect.TOLERANCE)
        to_ub = ((points - (ub - reach)).clamp(min=floor) / width) * (points >= ub - reach)
        to_lb = (((lb + reach) - points).clamp(min=floor) / width) * (points <= lb + reach)
        return None, (grad * to_lb).sum(1, keepdim=True), (grad * to_ub).sum(1, keepdim=True)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None
