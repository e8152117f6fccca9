"""Shortest moves onto a hyperplane inside the pixel range: the geometry of FAB and DeepFool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.threat import Ball, L1Ball, LinfBall

# Newton's method below is finite: each iteration settles at least one pixel, and in practice most of them.
ITERATIONS = 50


def onto_hyperplane(ball: Ball, point: Tensor, slope: Tensor, value: Tensor) -> Tensor:
    """Move of least length, in the ball's norm, from each point to `{z : value + <slope, z - point> = 0}`; as `point`.

    The points that are reached lie in the ball's pixel range. Where the hyperplane misses the range, the move ends in
    the corner that is nearest to it in value.

    Args:
        point: inside the pixel range. slope: normal of the hyperplane. value: [B].

    Every solution moves pixel i towards the hyperplane by min(t r_i, room_i), for the t at which the gap is closed,
    with r_i = |slope_i| (L2) or 1 (Linf; 0 where there is no slope). For L1 the steepest pixels move first, each as
    far as it can.

    Source: the problem is Croce and Hein (2020), "Minimally distorted adversarial examples", eq. (6).
    """
    flat = slope.flatten(1)
    # Towards a smaller value of the linear function where it is positive.
    direction = torch.where(value > 0, -1.0, 1.0).to(flat)[:, None] * flat.sign()
    down, up = ball.room(point)
    room = torch.where(direction > 0, up.flatten(1), down.flatten(1))
    size, gap = flat.abs(), value.abs()[:, None]
    if isinstance(ball, L1Ball):
        moves = _steepest_first(size, room, gap)
    else:
        moves = _side_by_side(size, room, gap, rate=torch.ones_like(gap) if isinstance(ball, LinfBall) else size)
    return (direction * moves).view_as(point)


def _side_by_side(size: Tensor, room: Tensor, gap: Tensor, rate: Tensor) -> Tensor:
    """min(t rate, room) [B, d] for the t >= 0 at which sum size * min(t rate, room) = gap [B, 1]; rate is [B, d] or,
    where all pixels have the same, [B, 1].

    The sum is concave and piecewise linear in t, so Newton's method from 0 never passes the solution, and ends on it.
    """
    growth = size * rate
    t = torch.zeros_like(gap)
    for _ in range(ITERATIONS):
        wanted = t * rate
        left = gap - torch.minimum(wanted, room).mul_(size).sum(1, keepdim=True)
        slope = torch.where(wanted < room, growth, 0.0).sum(1, keepdim=True)
        # A slope of zero: every pixel is at the border of the range, and the hyperplane lies beyond it.
        step = torch.where(slope > 0, left / slope, 0.0)
        t = t + step.clamp(min=0.0)
        if not bool((step > 1e-6 * t).any()):
            break
    return torch.minimum(t * rate, room)


def _steepest_first(size: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Moves [B, d] that close the gap [B, 1] with the pixels of the largest slopes, each used up before the next."""
    ordered, order = size.sort(dim=1, descending=True)
    # A pixel without slope closes no gap: its room counts as none, which also keeps 0 * inf out of the sum.
    space = torch.where(ordered > 0, room.gather(1, order), 0.0)
    before = F.pad((ordered * space).cumsum(1)[:, :-1], (1, 0))
    moves = ((gap - before).clamp(min=0.0) / ordered.clamp(min=torch.finfo(size.dtype).tiny)).minimum(space)
    return torch.zeros_like(size).scatter_(1, order, moves)
