"""Lower bounds of local Lipschitz constants, attained at points that a random search finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.threat import Ball
from certify.bounds.interval import interval_walk
from certify.bounds.jacobian import DUAL, gradient_graph
from certify.graph import Snapshot
from certify.interval import Interval
from certify.op import AnyBox

NUMBERS = 2**22
"""Numbers in the widest layer that one pass of the search evaluates."""


@dataclass(frozen=True)
class Search:
    """Uniform samples of the ball, then moves of shrinking size around the best point of each row.

    Args:
        samples: points per example, the centre among them; 0 for no search: the bound is 0.
        rounds: rounds of moves; each tries `moves` points for each row.
    """

    samples: int = 64
    rounds: int = 6
    moves: int = 16
    seed: int = 0


@torch.no_grad()
def attained_norms(
    snapshot: Snapshot, x: Tensor, rows: Tensor, ball: Ball, norm: str, search: Search
) -> tuple[Tensor, Tensor]:
    """(lower bounds `[B, R]` of the greatest dual norm of row . J over the ball, points `[B, R, *shape]`).

    Args:
        x: `[B, *shape]`.
        rows: `[B, R, K]`.
    """
    batch, count = rows.shape[:2]
    flat = rows.flatten(0, 1)
    owner = torch.arange(batch, device=x.device).repeat_interleave(count)
    points = x[owner]
    if not search.samples:
        return x.new_zeros(batch, count), points.unflatten(0, (batch, count))
    generator = torch.Generator(x.device).manual_seed(search.seed)
    best = gradient_norms(snapshot, x, rows, norm).flatten()
    for some in _portions(search.samples - 1, batch * _width(snapshot)):
        many = torch.arange(batch, device=x.device).repeat(some)
        found = ball.select(many).sample(x[many], generator)
        values = gradient_norms(snapshot.select(many), found, rows[many], norm).view(some, batch * count)
        best, points = _better(best, points, values, found.view(some, *x.shape)[:, owner])
    lo, hi = ball.box(x)
    for stage in range(search.rounds):
        size = 0.5 ** (1 + stage) * (hi - lo) / 2
        for some in _portions(search.moves, batch * count * _width(snapshot)):
            many = owner.repeat(some)
            noise = torch.randn(some * len(owner), *x.shape[1:], generator=generator, dtype=x.dtype, device=x.device)
            found = ball.select(many).project(points.repeat(some, *[1] * (x.dim() - 1)) + size[many] * noise, x[many])
            values = gradient_norms(snapshot.select(many), found, flat.repeat(some, 1).unsqueeze(1), norm).view(
                some, -1
            )
            best, points = _better(best, points, values, found.unflatten(0, (some, -1)))
    at_once = max(1, NUMBERS // _width(snapshot))
    parts = zip(owner.split(at_once), points.split(at_once), flat.split(at_once), strict=True)
    proven = torch.cat([proven_norms(snapshot.select(some), at, of, norm) for some, at, of in parts])
    return proven.view(batch, count), points.unflatten(0, (batch, count))


def _better(best: Tensor, points: Tensor, values: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The best values `[N]` and points `[N, *shape]` so far, given candidates `[S, N]` and `[S, N, *shape]`."""
    value, which = values.max(0)
    better = value > best
    points = points.clone()
    points[better] = found[which, torch.arange(len(best), device=best.device)][better]
    return torch.where(better, value, best), points


def _portions(total: int, numbers: int) -> Iterator[int]:
    """Parts of `total` whose `numbers` each stay within NUMBERS."""
    step = max(1, NUMBERS // numbers)
    return (min(step, total - begin) for begin in range(0, total, step))


def _width(snapshot: Snapshot) -> int:
    return max(int(torch.Size(node.shape).numel()) for node in snapshot.nodes)


def gradient_norms(snapshot: Snapshot, points: Tensor, rows: Tensor, norm: str) -> Tensor:
    """Dual norms of row . J as autograd gives it at the points, `[N, R]`; at a kink it may be no derivative.

    Args:
        points: `[N, *shape]`.
        rows: `[N, R, K]`.
    """
    found = []
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        logits = snapshot(points)
        for place in range(rows.shape[1]):
            keep = place + 1 < rows.shape[1]
            (gradient,) = torch.autograd.grad((logits * rows[:, place]).sum(), points, retain_graph=keep)
            found.append(torch.linalg.vector_norm(gradient.flatten(1), DUAL[norm], dim=1))
    return torch.stack(found, 1)


def proven_norms(snapshot: Snapshot, points: Tensor, rows: Tensor, norm: str) -> Tensor:
    """Dual norms of row . J that some element of Clarke's Jacobian has at each point, less rounding: `[N]`.

    Interval arithmetic over a tiny box around the point: an entry counts with the least magnitude that it has there, so
    that a point on a kink, where autograd may answer with what is no derivative at all, claims nothing it has not.
    """
    scale = points.flatten(1).abs().amax(1).clamp(min=1) * 1e3 * torch.finfo(points.dtype).eps
    tiny = torch.zeros_like(points) + scale.view(-1, *[1] * (points.dim() - 1))
    _, boxes = interval_walk(snapshot, Interval(points, tiny))
    graph, _ = gradient_graph(snapshot, boxes)
    box, _ = interval_walk(graph, Interval(rows, torch.zeros_like(rows)), keep_boxes=False)
    return torch.linalg.vector_norm(_mignitude(box).flatten(1), DUAL[norm], dim=1)


def _mignitude(box: AnyBox) -> Tensor:
    """Least magnitude in a box."""
    return torch.maximum(box.lb, -box.ub).clamp(min=0)
