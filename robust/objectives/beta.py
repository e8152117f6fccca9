"""BETA and SBETA: best targeted attack."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.ascent import Ascent, Task, ascend
from attacks.losses import strongest_targets, targeted_margin
from attacks.region import region_around
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, attacked_network, logits_at
from robust.views import Views


@OBJECTIVES.register("beta")
@dataclass(frozen=True)
class BETA:
    """CE at the point of largest margin M_j = z_j - z_y among those that attack each wrong class j (Robey et al. 2023);
    unreproduced: beyond the abstract the algorithm is from memory.

    The attacker climbs what decides about the class, not the learner's surrogate. With `sharpness` it is SBETA: the
    cross-entropies at all points, weighted by softmax_j(sharpness M_j), detached. Costs K - 1 attacks, in one batch.

    Args:
        sharpness: mu; None takes the largest margin alone.
        targets: number of wrong classes, those of largest logit at x; None for all.
        steps, step_size: of the sign ascent from a uniform start, in units of the radius.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the loss's pass; SBETA's is over all its points.
    """

    sharpness: float | None = None
    targets: int | None = None
    steps: int = 10
    step_size: float = 0.25
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        points, margins = views.once(("best targeted", self), lambda: self._search(views))
        count, width = margins.shape
        best = points[torch.arange(count, device=points.device), margins.argmax(1)]
        if self.sharpness is None:
            views.logits["adversarial"] = logits_at(views, best, self.batch_norm)
            return {"adversarial": cross_entropy(views.adversarial, views.y)}
        logits = logits_at(views, points.flatten(0, 1), self.batch_norm)
        found = logits.view(count, width, -1)
        views.logits["adversarial"] = found[torch.arange(count, device=points.device), margins.argmax(1)]
        losses = cross_entropy(logits, views.y.repeat_interleave(width)).view(count, width)
        return {"adversarial": ((self.sharpness * margins).softmax(1) * losses).sum(1)}

    def _search(self, views: Views) -> tuple[Tensor, Tensor]:
        """(points `[B, T, *shape]`, margins `[B, T]`) of every target."""
        network = attacked_network(views, self.statistics, self.steps)
        with torch.no_grad():
            targets = strongest_targets(network(views.x), views.y, self.targets)
        count, width = targets.shape
        example = torch.arange(count, device=targets.device).repeat_interleave(width)
        task = Task(views.x, (views.y,), views.ball, pace=views.pace).select(example)
        task = replace(task, labels=(*task.labels, targets.flatten()))
        region = region_around(task.x, task.ball)
        region = region if task.pace is None else region.paced(task.pace)
        start = region.sample(views.generator)
        plan = Ascent(self.steps, self.step_size, keep="last")
        points = ascend(network, targeted_margin, task, start, plan, region)[0]
        with torch.no_grad():
            margins = targeted_margin(network(points), *task.labels)
        return points.view(count, width, *views.x.shape[1:]), margins.view(count, width)
