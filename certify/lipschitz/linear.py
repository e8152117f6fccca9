"""Local Lipschitz constants by one pass of interval or linear bounds over the gradient's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from certify.bounds.alpha_crown import tightened_boxes
from certify.bounds.crown import Boxes, intermediate_boxes
from certify.bounds.interval import interval_walk
from certify.bounds.jacobian import PROPAGATIONS, Propagation, entry_bounds, gradient_graph, row_norms
from certify.bounds.jacobian_core import has_core, shared_row_norms
from certify.graph import Snapshot
from certify.lipschitz.problem import Problem
from certify.op import Box

NUMBERS = 2**24
"""Numbers in the widest layer, over all problems that are bounded at a time; CROWN's rows have their own budget."""

DEAR = 2**18
"""Entries of a gradient times numbers of the widest layer, from which on examples are bounded by their cores."""

States = Literal["interval", "crown", "alpha_crown"]


def interval(problem: Problem, states: States = "interval", iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """Interval arithmetic on the gradient. With states="crown" it is Fast-Lip (Weng et al. 2018)."""
    return _bounded(problem, "interval", states, iterations)


def recurjac(problem: Problem, states: States = "crown", iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """RecurJac, backward direction (Zhang et al. 2019): lines of unknown sign are constants."""
    return _bounded(problem, "recurjac", states, iterations)


def crown(problem: Problem, states: States = "crown", iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """Linear bounds with the best lines for every product (Shi et al. 2022, without branching)."""
    return _bounded(problem, "crown", states, iterations)


def _bounded(problem: Problem, method: Propagation, states: States, iterations: int | None) -> tuple[Tensor, Tensor]:
    boxes = state_boxes(problem, states, iterations)
    graphs = [] if method == "interval" else _with_cores(problem, boxes)
    if graphs:
        shared = zip(graphs, problem.rows, strict=True)
        ub = [shared_row_norms(graph, rows, problem.norm, method) for graph, rows in shared]
    else:
        ub = [
            row_norms(problem.snapshot.select(owner), select(boxes, owner), rows, problem.norm, method).ub
            for owner, rows in _problems(problem)
        ]
    return torch.cat(ub).view(problem.rows.shape[:2]), problem.attained()


def _with_cores(problem: Problem, boxes: Boxes) -> list[Snapshot]:
    """The gradient's graph of each example, if all have cores and a pass for every entry is dear, else nothing."""
    if problem.x[0].numel() * _widest(problem) < DEAR:
        return []
    graphs = []
    for one in torch.arange(len(problem.x), device=problem.x.device).unsqueeze(1):
        graph = gradient_graph(problem.snapshot.select(one), select(boxes, one)).snapshot
        if not has_core(graph):
            return []
        graphs.append(graph)
    return graphs


def _widest(problem: Problem) -> int:
    return max(int(torch.Size(node.shape).numel()) for node in problem.snapshot.nodes)


def entries(problem: Problem, method: Propagation, states: States = "crown", iterations: int | None = None) -> Box:
    """Bounds of the Jacobian's entries, each `[B, R, *shape]`."""
    if method not in PROPAGATIONS:
        raise ValueError(f"no method {method!r} for bounds of entries; known: {', '.join(PROPAGATIONS)}")
    boxes = state_boxes(problem, states, iterations)
    found = [
        entry_bounds(problem.snapshot.select(owner), select(boxes, owner), rows, method)
        for owner, rows in _problems(problem)
    ]
    shape = (*problem.rows.shape[:2], *problem.x.shape[1:])
    return Box(*(torch.cat(side).view(shape) for side in zip(*found, strict=True)))


def state_boxes(problem: Problem, states: States, iterations: int | None = None) -> Boxes:
    """Bounds before the activations, `[B, ...]`; `iterations` of the slopes' optimisation for "alpha_crown"."""
    if states not in get_args(States):
        raise ValueError(f"no bounds {states!r} before the activations; known: {', '.join(get_args(States))}")
    if iterations is not None and states != "alpha_crown":
        raise ValueError(f'iterations={iterations} is of states="alpha_crown", not of states="{states}"')
    if states == "interval":
        return interval_walk(problem.snapshot, problem.region.interval())[1]
    if states == "crown":
        return intermediate_boxes(problem.snapshot, problem.region)
    return tightened_boxes(problem.snapshot, problem.region, iterations=20 if iterations is None else iterations)


def select(boxes: Boxes, index: Tensor) -> Boxes:
    """Boxes of some members of the batch, with repetitions."""
    return {place: Box(box.lb[index], box.ub[index]) for place, box in boxes.items()}


def _problems(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """(examples `[N]`, rows `[N, K]`) in portions whose widest layer holds at most NUMBERS numbers."""
    batch, count = problem.rows.shape[:2]
    owner = torch.arange(batch, device=problem.x.device).repeat_interleave(count)
    size = max(1, NUMBERS // _widest(problem))
    return zip(owner.split(size), problem.rows.flatten(0, 1).split(size), strict=True)
