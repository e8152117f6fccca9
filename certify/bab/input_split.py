"""Branching on the input: the region is halved along one input at a time, and CROWN bounds the network on each half.

With few inputs this needs far fewer domains than splits of neurons: on a small box most neurons are stable, whatever
the depth of the network. With many inputs it needs hopelessly many.
Source: the rule for the input is first-order, as in Wang et al. (2018), ReluVal's smear.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.bounds.crown import backward, intermediate_boxes, output_rows
from certify.graph import Snapshot
from certify.ops.affine import Linear
from certify.precision import ALLOWANCES, proves
from certify.region import Region

BOXES = 2**14
"""Boxes that a search may bound; it ends after an eighth of them if it would not get by with that many."""

BATCH = 128
"""Boxes bounded in one pass."""


@dataclass
class Halving:
    """Outcome of a search.

    Attributes:
        low: lower bounds of the rows on the whole region, less their allowance, float64 `[R]` on the CPU.
        proven: whether every row is positive.
        domains: boxes bounded.
        witness: a point `[*shape]` at which a row is <= 0, if one was met.
        doubtful: whether an attained value contradicts the proof, or is too close to 0 to tell.
    """

    low: Tensor
    proven: bool = False
    domains: int = 0
    witness: Tensor | None = None
    doubtful: bool = False


@dataclass(frozen=True)
class Boxes:
    """Open boxes `[D, *shape]`, the share of the region that each one is, `[D]`, and bounds of the rows, `[D, R]`."""

    lb: Tensor
    ub: Tensor
    share: Tensor
    low: Tensor

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, which: Tensor | slice) -> Boxes:
        return Boxes(self.lb[which], self.ub[which], self.share[which], self.low[which])

    def join(self, other: Boxes) -> Boxes:
        return Boxes(*(torch.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def free_inputs(region: Region) -> int:
    """Inputs that can move; none count where the region is a ball, whose parts are no balls."""
    return int((region.radius > 0).sum()) if region.ball is None else region.radius[0].numel() + 1


def split_inputs(snapshot: Snapshot, region: Region, size: Tensor, deadline: float) -> Halving:
    """Search for a proof of all rows, the worst boxes first.

    Args:
        snapshot: network that ends in its specification, for one example.
        region: a box around that example.
        size: rounding size of the rows, `[R]`.
        deadline: value of time.perf_counter() at which to give up.
    """
    snapshot = _for_any_batch(snapshot)
    lb, ub = region.center - region.radius, region.center + region.radius
    whole = Boxes(lb, ub, lb.new_ones(1), lb.new_full((1, len(size)), -math.inf))
    result, closed, seen = Halving(torch.empty(0)), torch.full_like(size, math.inf), math.inf
    stack = whole
    while len(stack):
        hopeless = result.domains > BOXES / 8 and result.domains > BOXES * (1 - float(stack.share.sum()))
        if hopeless or time.perf_counter() > deadline:
            break
        order = stack.low.amin(1).argsort(descending=True)
        some, stack = stack[order[-BATCH:]], stack[order[:-BATCH]]
        result.domains += len(some)
        low, scale, A, points = _bounds(snapshot, some)
        values = snapshot(points).amin(1)
        worst = int(values.argmin())
        seen = min(seen, float(values[worst]))
        if float(values[worst]) <= 0:
            result.witness, result.low = points[worst], torch.full((len(size),), -math.inf, dtype=torch.float64)
            return result
        done = proves(low, scale, size).all(1)
        of_scale, of_size = ALLOWANCES[low.dtype]
        low = low - torch.maximum(scale * of_scale, size * of_size)
        closed = torch.minimum(closed, low[done].amin(0)) if bool(done.any()) else closed
        stack = stack.join(_halves(replace(some, low=torch.maximum(low, some.low))[~done], A[~done]))
    left = stack.low.amin(0) if len(stack) else closed
    result.low = torch.minimum(closed, left).double().cpu()
    # A box is proven beyond this value; a point that does not reach it speaks against the proof.
    contradicted = seen <= float(size.min()) * ALLOWANCES[size.dtype][1]
    result.proven, result.doubtful = not len(stack) and not contradicted, not len(stack) and contradicted
    return result


def _bounds(snapshot: Snapshot, some: Boxes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(bounds of the rows, their scale `[D, R]`; coefficients of the worst row, a point of each box `[D, *shape]`)."""
    part = Region.between(some.lb, some.ub)
    linear = backward(
        snapshot, len(snapshot.nodes) - 1, output_rows(snapshot, part), intermediate_boxes(snapshot, part)
    )
    low, scale = part.minimum(linear.A, linear.constant).T, (part.magnitude(linear.A) + linear.scale).T
    A = linear.A[low.nan_to_num(nan=-math.inf).argmin(1), torch.arange(len(some), device=low.device)]
    return low, scale, A, torch.where(A > 0, some.lb, torch.where(A < 0, some.ub, part.center))


def _halves(boxes: Boxes, A: Tensor) -> Boxes:
    """Both halves of every box, along the input that the bound depends on most."""
    width = (boxes.ub - boxes.lb).flatten(1)
    effect = A.flatten(1).abs()
    # Inputs whose coefficient happens to vanish get their turn, too.
    score = (effect + 1e-3 * effect.amax(1, keepdim=True)) * width + torch.finfo(width.dtype).tiny * width
    along = torch.zeros_like(width, dtype=torch.bool).scatter_(1, score.argmax(1, keepdim=True), True)
    along = along.view_as(boxes.lb)
    middle = (boxes.lb + boxes.ub) / 2
    half = boxes.share / 2
    lower = Boxes(boxes.lb, torch.where(along, middle, boxes.ub), half, boxes.low)
    return lower.join(Boxes(torch.where(along, middle, boxes.lb), boxes.ub, half, boxes.low))


def _for_any_batch(snapshot: Snapshot) -> Snapshot:
    """The network of one example as one that takes any number of inputs."""
    *front, last = snapshot.nodes
    assert isinstance(last.op, Linear) and len(last.op.weight) == 1
    bias = None if last.op.bias is None else last.op.bias.view(-1)
    return Snapshot((*front, replace(last, op=Linear(last.op.weight[0], bias))))
