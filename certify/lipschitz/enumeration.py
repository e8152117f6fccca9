"""Exact local Lipschitz constants of small ReLU networks: every linear piece that meets the ball's box is visited."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify.bounds.crown import Boxes, Rows, backward
from certify.bounds.jacobian import row_norms
from certify.graph import Snapshot
from certify.lipschitz.cells import THINNEST, HalfSpaces, deepest_points
from certify.lipschitz.linear import select, state_boxes
from certify.lipschitz.problem import Problem
from certify.lipschitz.search import proven_norms
from certify.op import Box, UnsupportedOp
from certify.ops.relu import ReLU


@dataclass(frozen=True)
class Pieces:
    """N cells of one example, the signs of the first ReLUs being known.

    Attributes:
        half_spaces: those of their signs.
        point: inside, `[N, d]`.
        boxes: of the inputs of ReLUs; those that are done have the sign of the cell.
    """

    half_spaces: HalfSpaces
    point: Tensor
    boxes: Boxes

    def __len__(self) -> int:
        return len(self.point)

    def select(self, index: Tensor) -> Pieces:
        """Some of the cells."""
        return Pieces(
            HalfSpaces(*(t[:, index] for t in self.half_spaces)), self.point[index], select(self.boxes, index)
        )


def exact(problem: Problem, *, most: int = 20_000) -> tuple[Tensor, Tensor]:
    """(constants, the same as attained) `[B, R]` of a network whose only nonlinear ops are ReLUs; linf balls.

    Layer by layer, each cell is divided by the sign of each neuron that may have both; neurons are affine on it, and a
    linear program says whether a half has an interior. A cell is left out as soon as linear bounds show that it cannot
    exceed what is attained elsewhere in any row.

    Args:
        most: cells at a time, from which on a ValueError advises branch and bound.
    """
    _check(problem)
    boxes = state_boxes(problem, "crown")
    lb = problem.attained()
    ub = [_enumerated(problem, i, select(boxes, torch.tensor([i])), lb[i], most) for i in range(len(lb))]
    best = torch.stack(ub) if ub else lb
    return best, best


def _check(problem: Problem) -> None:
    if problem.ball.norm != "linf":
        raise ValueError(f"exact enumerates the cells of a box, not of an {problem.ball.norm} ball; use bab")
    for node in problem.snapshot.nodes[1:]:
        if not node.op.is_linear and not isinstance(node.op, ReLU):
            raise UnsupportedOp(f"exact knows networks of affine ops and ReLUs; node {node.name!r} is another; use bab")


def _enumerated(problem: Problem, i: int, boxes: Boxes, best: Tensor, most: int) -> Tensor:
    """Constants `[R]` of one example."""
    region = problem.region
    center, radius = region.center[i].flatten(), region.radius[i].flatten()
    nothing = center.new_zeros(0, 1)
    pieces = Pieces(HalfSpaces(center.new_zeros(0, 1, len(center)), nothing, nothing.bool()), center[None], boxes)
    for place in sorted(boxes):
        open_neurons = ((boxes[place].lb <= 0) & (boxes[place].ub >= 0)).flatten().nonzero().flatten()
        if not len(open_neurons):
            continue
        A, c = _affine(_network(problem, i, len(pieces)), place, open_neurons, pieces)
        for number, neuron in enumerate(open_neurons.tolist()):
            pieces, kept = _divided(pieces, place, neuron, A[number], c[number], center, radius)
            pieces, best, hopeful = _hopeful(problem, i, pieces, best)
            if not len(pieces):
                return best
            A, c = A[:, kept[hopeful]], c[:, kept[hopeful]]
            if len(pieces) > most:
                raise ValueError(f"more than {most} linear pieces at a time; use bab, or give a greater `most`")
    return best


def _network(problem: Problem, i: int, count: int) -> Snapshot:
    """The network for `count` cells of one example."""
    return problem.snapshot.select(torch.full((count,), i, device=problem.x.device))


def _affine(snapshot: Snapshot, place: int, neurons: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """(A `[M, N, d]`, c `[M, N]`) of neurons of a node on cells that know all signs before it."""
    index = neurons.unsqueeze(1).expand(-1, len(pieces))
    rows = Rows(index, torch.ones_like(index, dtype=torch.bool))
    coefficients = rows.coefficients(snapshot.nodes[place].shape, pieces.point.dtype)[: len(neurons)]
    linear = backward(snapshot, place, coefficients, pieces.boxes)
    return linear.A.flatten(2), linear.constant


def _divided(
    pieces: Pieces, place: int, neuron: int, A: Tensor, c: Tensor, center: Tensor, radius: Tensor
) -> tuple[Pieces, Tensor]:
    """Both halves of each cell that have an interior, and the cell `[N']` that each is a half of."""
    halves, origins = [], []
    for sign in (1.0, -1.0):
        with_half = HalfSpaces(
            torch.cat([pieces.half_spaces.A, -sign * A.unsqueeze(0)]),
            torch.cat([pieces.half_spaces.c, -sign * c.unsqueeze(0)]),
            torch.cat([pieces.half_spaces.keep, torch.ones_like(c, dtype=torch.bool).unsqueeze(0)]),
        )
        lo, hi = ((center + side * radius).expand(len(pieces), -1) for side in (-1, 1))
        depth, point = deepest_points(with_half, lo, hi)
        box = pieces.boxes[place]
        side = torch.full_like(box.lb.flatten(1)[:, neuron], sign * torch.finfo(box.lb.dtype).tiny)
        lb, ub = box.lb.flatten(1).clone(), box.ub.flatten(1).clone()
        lb[:, neuron], ub[:, neuron] = side, side
        boxes = {**pieces.boxes, place: Box(lb.view_as(box.lb), ub.view_as(box.ub))}
        keep = (depth > THINNEST).nonzero().flatten()
        halves.append(Pieces(with_half, point, boxes).select(keep))
        origins.append(keep)
    spaces = HalfSpaces(*(torch.cat(pair, 1) for pair in zip(*(h.half_spaces for h in halves), strict=True)))
    boxes = {
        p: Box(*(torch.cat(pair) for pair in zip(*(h.boxes[p] for h in halves), strict=True))) for p in pieces.boxes
    }
    return Pieces(spaces, torch.cat([h.point for h in halves]), boxes), torch.cat(origins)


def _hopeful(problem: Problem, i: int, pieces: Pieces, best: Tensor) -> tuple[Pieces, Tensor, Tensor]:
    """(cells that may exceed what is attained in some row, what is attained `[R]`, their numbers)."""
    count, rows = len(pieces), problem.rows[i]
    if not count:
        return pieces, best, torch.zeros(0, dtype=torch.long)
    owner = torch.arange(count).repeat_interleave(len(rows))
    many, network = rows.repeat(count, 1), _network(problem, i, count * len(rows))
    points = pieces.point.view(-1, *problem.x.shape[1:])[owner]
    value = proven_norms(network, points, many, problem.norm).view(count, -1)
    best = torch.cat([best[None], value]).amax(0)
    ub = row_norms(network, select(pieces.boxes, owner), many, problem.norm, "crown").ub.view(count, -1)
    hopeful = (ub > best * (1 + THINNEST)).any(1).nonzero().flatten()
    return pieces.select(hopeful), best, hopeful
