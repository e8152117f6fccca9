"""One training step: the loss of a batch and its gradients, in one piece or in parts, as often as the step asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attacks.noise import Share
from certify.graph import Graph
from certify.ops.batch_norm import Statistics
from robust.active import Active, Moment
from robust.batch_norm import statistics_kept
from robust.settings import Settings
from robust.team import Part, Team
from robust.views import Views, WholeViews
from robust.weighting import Weighting, radius_of


@dataclass(frozen=True)
class StepPlan:
    """What one step needs besides model and images: loss, regularisers, schedules' values and randomness.

    Attributes:
        weightings: act on the objective's terms, in this order.
        watchers: see the views of the step; `moment` is what they are told along with them.
    """

    objective: Any
    regularizers: list[Any]
    eps_fraction: float
    ramp: float
    generator: torch.Generator
    weightings: Sequence[Weighting] = ()
    watchers: Sequence[Active] = ()
    moment: Moment | None = None


Keep = Callable[[Tensor], Tensor]
"""Losses of the examples `[B]`, detached -> factor on each, `[B]`."""


class BatchLoss:
    """The loss of one batch at whatever weights the model has when it is asked for; images and attacks stay the same.

    With `settings.micro_batch` the images are attacked and bounded in parts. BatchNorm statistics are those of the
    whole batch all the same, and the gradient through them is exact: the parts' gradients in the statistics are
    collected and sent through the clean pass once.

    Args:
        x, y: this process's images and labels, `[B, C, H, W]` and `[B]`.
        index: numbers of the images among the training images, `[B]`.
        team: processes that have the other images of the batch; the gradients and terms are then those of the whole.
        parts: see `parts_of`; with a team.
    """

    def __init__(
        self,
        graph: Graph,
        x: Tensor,
        y: Tensor,
        plan: StepPlan,
        settings: Settings,
        index: Tensor | None = None,
        team: Team | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        self.graph, self.x, self.y, self.plan, self.settings, self.index = graph, x, y, plan, settings, index
        self.team = team
        self.parts = parts_of(len(x), settings, None) if parts is None else parts
        self.count = sum(part.count for part in self.parts)
        self.kept: list[dict[Any, Any]] = [{} for _ in self.parts]
        self.radius = radius_of(plan.weightings, y)

    def backward(self, move_statistics: bool = True) -> dict[str, Tensor]:
        """Add the gradients of the loss to the parameters; the terms' batch means. Active methods see the views.

        Args:
            move_statistics: whether running statistics follow; they already have where an earlier pass did it.
        """
        return self._added_up(self._accumulate(None, None, self._show, move_statistics))

    def gradients(
        self, parameters: Sequence[nn.Parameter], keep: Keep | None = None, move_statistics: bool = False
    ) -> list[Tensor]:
        """Gradients in the parameters, without a trace in their `.grad`; zero where the loss does not depend on one.

        Args:
            keep: factors on the examples' losses, for perturbations that look at some examples only.
            move_statistics: whether the running statistics follow.
        """
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            self._accumulate(parameters, keep, lambda views: None, move_statistics)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            if self.team is not None:
                self.team.add_up(gradients)
            return gradients
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def _added_up(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms summed over the processes, of which each has its images' share."""
        if self.team is None:
            return terms
        values = torch.stack(list(terms.values()))
        self.team.add_up([values])
        return dict(zip(terms, values, strict=True))

    def _accumulate(
        self, parameters: Sequence[nn.Parameter] | None, keep: Keep | None, show: Callable[[Views], None], move: bool
    ) -> dict[str, Tensor]:
        if len(self.parts) == 1:
            return self._part(self._views(0, None, move), parameters, keep, show)
        layers = self.graph.batch_norm_layers()
        with contextlib.nullcontext() if move else statistics_kept(layers):
            statistics = self.graph.forward_train(self.x)[1] if layers else {}
        leaves = {place: Statistics(*(t.detach().requires_grad_() for t in pair)) for place, pair in statistics.items()}
        inputs = None if parameters is None else [*parameters, *_tensors(leaves)]
        totals: dict[str, Tensor] = {}
        for number in range(len(self.parts)):
            for name, value in self._part(self._views(number, leaves, move), inputs, keep, show).items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value
        used = [(t, leaf.grad) for t, leaf in zip(_tensors(statistics), _tensors(leaves), strict=True)]
        reached = [(t, gradient) for t, gradient in used if gradient is not None]
        if reached:
            torch.autograd.backward([t for t, _ in reached], [g for _, g in reached], inputs=parameters)
        return totals

    def _part(
        self, views: Views, inputs: Sequence[Tensor] | None, keep: Keep | None, show: Callable[[Views], None]
    ) -> dict[str, Tensor]:
        share = len(views.x) / self.count
        terms = {name: share * value for name, value in self._terms(views, keep).items()}
        torch.autograd.backward(torch.stack(list(terms.values())).sum(), inputs=inputs)
        show(views)
        return {name: value.detach() for name, value in terms.items()}

    def _views(self, number: int, statistics: Mapping[int, Statistics] | None, move: bool) -> Views:
        plan, part = self.plan, self.parts[number].own
        generator = plan.generator
        if self.team is not None:
            place = self.parts[number]
            generator = Share(generator, torch.arange(place.share.start, place.share.stop), place.count)
        ball, pace = self.settings.train_ball().scaled(plan.eps_fraction), None
        if self.radius is not None:
            ball = ball.scaled(self.radius.eps[part])
            # Steps grow with the radius by themselves; where both factors agree this is 1, also at radius 0.
            pace = torch.where(self.radius.eps > 0, self.radius.step / self.radius.eps, 1.0)[part]
        return Views(
            self.graph,
            self.x[part],
            self.y[part],
            ball,
            generator,
            plan.eps_fraction,
            plan.ramp,
            statistics,
            note_boxes=plan.ramp < 1 and any(r.needs_boxes for r in plan.regularizers),
            index=None if self.index is None else self.index[part],
            epoch=0.0 if plan.moment is None else plan.moment.epoch,
            pace=pace,
            count_correct=any(weighting.needs_kappa for weighting in plan.weightings),
            kept=self.kept[number],
            moves_statistics=move,
            team=self.team,
            part=None if self.team is None else self.parts[number],
        )

    def _terms(self, views: Views, keep: Keep | None) -> dict[str, Tensor]:
        terms = self.plan.objective(views)
        if self.plan.weightings:
            shown = _shown(views)
            terms = {name: views.whole(value) for name, value in terms.items()}
            for weighting in self.plan.weightings:
                terms = weighting(shown, terms)
        if keep is not None:
            weight = keep(torch.stack(list(terms.values())).sum(0).detach())
            terms = {name: weight * value for name, value in terms.items()}
        means = {name: value.mean() for name, value in terms.items()}
        # What is kept or left out is examples' losses; terms of no example would drive the weights where none is kept.
        for regularizer in self.plan.regularizers if keep is None else []:
            for name, value in regularizer(views).items():
                if name in means:
                    raise ValueError(f"two methods of the run add a term {name!r} to the loss; keep one of them")
                means[name] = value
        return means

    @torch.no_grad()
    def _show(self, views: Views) -> None:
        for watcher in self.plan.watchers:
            assert self.plan.moment is not None
            watcher.see(_shown(views), self.plan.moment)


def parts_of(count: int, settings: Settings, team: Team | None) -> list[Part]:
    """The parts in which a batch of `count` images is attacked and bounded, with this process's rows of each.

    Raises:
        ValueError: a part has fewer images than there are processes.
    """
    size = settings.micro_batch if 0 < settings.micro_batch < count else count
    if team is not None:
        return team.parts(count, size)
    stops = [min(start + size, count) for start in range(0, count, size)]
    return [Part(slice(start, stop), 0, stop - start) for start, stop in zip(range(0, count, size), stops, strict=True)]


def _shown(views: Views) -> Views:
    """The views as weightings and watchers see them: of the whole batch."""
    return views if views.team is None else cast(Views, WholeViews(views))


def step_gradients(graph: Graph, x: Tensor, y: Tensor, plan: StepPlan, settings: Settings) -> dict[str, Tensor]:
    """Add the gradients of a batch's loss to the parameters; the terms' batch means."""
    return BatchLoss(graph, x, y, plan, settings).backward()


def _tensors(statistics: Mapping[int, Statistics]) -> list[Tensor]:
    return [t for pair in statistics.values() for t in pair]
