"""Latent adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.ascent import Ascent, Task, ascend
from attacks.losses import cross_entropy as attacked_loss
from attacks.threat import L2Ball
from robust.objective import OBJECTIVES, cross_entropy, mixed
from robust.objectives.taps import split_before_relus
from robust.views import Views


@OBJECTIVES.register("lat")
@dataclass(frozen=True)
class LAT:
    """Cross-entropy where activations, not images, are moved: CE(g(h(x) + s d), y), |d|_2 <= radius, found by PGD
    (Casper et al. 2024); unreproduced: layer, radius and steps for images are not published.

    s is the standard deviation of each activation over the batch. All passes have the clean batch's statistics. The
    threat model's radius plays no part.

    Args:
        classifier_relus: ReLUs behind the activations that are moved, see taps.
        radius: of d. steps, step_size: of the ascent from a uniform start, in units of the radius.
        robust_weight: weight of the term; the rest goes to the clean one.
    """

    classifier_relus: int = 1
    radius: float = 1.0
    steps: int = 10
    step_size: float = 0.25
    robust_weight: float = 1.0

    def __call__(self, views: Views) -> dict[str, Tensor]:
        features, classifier = split_before_relus(views.snapshot, self.classifier_relus)
        latent = features(views.x)
        scale = views.whole(latent.detach()).std(0, correction=0, keepdim=True)

        def search() -> Tensor:
            frozen, fixed = classifier.without_gradient(), latent.detach()
            ball = L2Ball(self.radius * views.eps_fraction, pixel_range=None)
            origin = torch.zeros_like(fixed)
            start, plan = ball.sample(origin, views.generator), Ascent(self.steps, self.step_size, keep="last")
            task = Task(origin, (views.y,), ball)
            return ascend(lambda d: frozen(fixed + scale * d), attacked_loss, task, start, plan)[0]

        views.logits["adversarial"] = classifier(latent + scale * views.once(("latent", self), search))
        return mixed(views, self.robust_weight, {"adversarial": cross_entropy(views.adversarial, views.y)})
