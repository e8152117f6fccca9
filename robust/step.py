"""One training step: the gradients of a batch's loss, in one piece or in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certify.graph import Graph
from certify.ops.batch_norm import Statistics
from robust.settings import Settings
from robust.views import Views


@dataclass(frozen=True)
class StepPlan:
    """What one step needs besides model and images: loss, regularisers, schedules' values and randomness."""

    objective: Any
    regularizers: list[Any]
    eps_fraction: float
    ramp: float
    generator: torch.Generator


def step_gradients(graph: Graph, x: Tensor, y: Tensor, plan: StepPlan, settings: Settings) -> dict[str, Tensor]:
    """Add the gradients of a batch's loss to the parameters; the terms' batch means.

    With `settings.micro_batch` the images are attacked and bounded in parts. BatchNorm statistics are those of the
    whole batch all the same, and the gradient through them is exact: the parts' gradients in the statistics are
    collected and sent through the clean pass once.
    """
    if not 0 < settings.micro_batch < len(x):
        views = _views(graph, x, y, plan, settings)
        terms = _terms(views, plan)
        torch.stack(list(terms.values())).sum().backward()
        return {name: value.detach() for name, value in terms.items()}
    statistics = graph.forward_train(x)[1] if graph.has_batch_norm else {}
    leaves = {place: Statistics(*(t.detach().requires_grad_() for t in pair)) for place, pair in statistics.items()}
    totals: dict[str, Tensor] = {}
    for start in range(0, len(x), settings.micro_batch):
        part = slice(start, start + settings.micro_batch)
        views = _views(graph, x[part], y[part], plan, settings, leaves)
        share = len(views.x) / len(x)
        terms = {name: share * value for name, value in _terms(views, plan).items()}
        torch.stack(list(terms.values())).sum().backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
    pairs = [(t, leaf) for place, pair in statistics.items() for t, leaf in zip(pair, leaves[place], strict=True)]
    used = [(t, leaf.grad) for t, leaf in pairs if leaf.grad is not None]
    if used:
        torch.autograd.backward([t for t, _ in used], [grad for _, grad in used])
    return totals


def _views(
    graph: Graph,
    x: Tensor,
    y: Tensor,
    plan: StepPlan,
    settings: Settings,
    statistics: Mapping[int, Statistics] | None = None,
) -> Views:
    return Views(
        graph,
        x,
        y,
        settings.train_ball().scaled(plan.eps_fraction),
        plan.generator,
        plan.eps_fraction,
        plan.ramp,
        statistics,
        note_boxes=plan.ramp < 1 and any(r.needs_boxes for r in plan.regularizers),
    )


def _terms(views: Views, plan: StepPlan) -> dict[str, Tensor]:
    terms = {name: value.mean() for name, value in plan.objective(views).items()}
    for regularizer in plan.regularizers:
        terms.update(regularizer(views))
    return terms
