"""CROWN: backward linear bound propagation (Zhang et al. 2018), with intermediate bounds only where they help.

Also the home of the backward pass that crown_ibp and alpha_crown share.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from certify.graph import Snapshot
from certify.interval import Interval
from certify.op import AnyBox, Box, Op
from certify.ops import affine
from certify.ops.affine import Pad, Scale
from certify.ops.relu import ReLU
from certify.ops.reshape import Identity, Permute, Reshape
from certify.region import Region

ROW_BUDGET, ROW_BUDGET_ON_CPU = 2**26, 2**21
"""Numbers in the largest coefficient tensor of a backward pass; more rows than fit are done in chunks.

On a CPU memory of this size is at hand when it is asked for again, where the system clears larger tensors every time:
CROWN is up to three times as fast for it (scripts/bench/RESULTS.md).
"""

Boxes = dict[int, AnyBox]
"""Bounds of nodes by place; at least of every node that a nonlinear op reads."""

Alphas = Mapping[int, Tensor]
"""Free relaxation parameters `[free, R, B, *shape]` by place of the activation, for the rows of one start node."""


class Linear(NamedTuple):
    """`A x + constant` over the input, below the rows it was computed for.

    A: `[R, B, *input]`; constant: `[R, B]`; scale: `[R, B]`, sum of the sizes of the constants added up.
    """

    A: Tensor
    constant: Tensor
    scale: Tensor


def backward(
    snapshot: Snapshot,
    start: int,
    A: Tensor,
    boxes: Boxes,
    alphas: Alphas | None = None,
    record: dict[int, Tensor] | None = None,
) -> Linear:
    """Linear lower bounds of the rows `A . value(start)` in terms of the input.

    Args:
        start: place of the node that the rows read.
        A: `[R, B, *shape of start]`.
        boxes: bounds of the inputs of nonlinear ops before `start`.
        alphas: relaxation parameters; ops without an entry use their default.
        record: is given the coefficients of every nonlinear op's value, by place.
    """
    pending: dict[int, Tensor] = {start: A}
    constant = A.new_zeros(A.shape[:2])
    scale = A.new_zeros(A.shape[:2])
    for place in range(start, 0, -1):
        if place not in pending:
            continue
        node = snapshot.nodes[place]
        coefficients = pending.pop(place)
        if record is not None and not node.op.is_linear:
            record[place] = coefficients
        free = None if alphas is None else alphas.get(place)
        sources, added = node.op.backward(coefficients, [boxes.get(i) for i in node.inputs], free)
        constant = constant + added
        scale = scale + added.detach().abs()
        for i, source in zip(node.inputs, sources, strict=True):
            pending[i] = pending[i] + source if i in pending else source
    return Linear(pending[0], constant, scale)


def relaxed_inputs(snapshot: Snapshot) -> list[int]:
    """Places of the nodes whose bounds a nonlinear op needs, in topological order."""
    return sorted({i for node in snapshot.nodes[1:] if not node.op.is_linear for i in node.inputs})


def affine_of_input(snapshot: Snapshot) -> list[bool]:
    """Whether each node is an affine function of the input."""
    affine = [True]
    for node in snapshot.nodes[1:]:
        affine.append(node.op.is_linear and all(affine[i] for i in node.inputs))
    return affine


@dataclass(frozen=True)
class Rows:
    """Signed unit rows at a node: for each example the neurons to bound, from below (+1) and from above (-1).

    Examples with fewer neurons than the longest list repeat their first one.

    Attributes:
        index: flat neuron numbers `[N, B]`.
        keep: bool `[N, B]`, False at the repetitions.
    """

    index: Tensor
    keep: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """Rows for the True entries of `mask` `[B, *shape]`."""
        flat = mask.flatten(1)
        count = int(flat.sum(1).max())
        order = flat.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        return cls(order.T.contiguous(), flat.gather(1, order).T.contiguous())

    def __len__(self) -> int:
        return len(self.index)

    def chunk(self, begin: int, end: int) -> Rows:
        return Rows(self.index[begin:end], self.keep[begin:end])

    def coefficients(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`[2N, B, *shape]`: the unit rows, then their negatives."""
        count, batch = self.index.shape
        width = int(torch.Size(shape).numel())
        A = torch.zeros(2, count, batch, width, dtype=dtype, device=self.index.device)
        A[0].scatter_(2, self.index.unsqueeze(2), 1.0)
        A[1].scatter_(2, self.index.unsqueeze(2), -1.0)
        return A.view(2 * count, batch, *shape)

    def write(self, box: Box, low: Tensor) -> Box:
        """`box` tightened by the rows' lower bounds `[2N, B]`."""
        lb, ub = (t.flatten(1) for t in box)
        index, keep = self.index.T, self.keep.T
        below, above = low[: len(self)].T, -low[len(self) :].T
        found_lb, found_ub = lb.gather(1, index), ub.gather(1, index)
        below = torch.where(keep, torch.maximum(below, found_lb), found_lb)
        above = torch.where(keep, torch.minimum(above, found_ub), found_ub)
        # Repetitions point at a neuron that another row writes: route them to a spare column.
        spare = lb.shape[1]
        target = torch.where(keep, index, spare)
        lb = torch.cat([lb, lb[:, :1]], 1).scatter(1, target, below)[:, :spare]
        ub = torch.cat([ub, ub[:, :1]], 1).scatter(1, target, above)[:, :spare]
        return Box(lb.view_as(box.lb), ub.view_as(box.ub))


RowBounds = Callable[[Snapshot, int, Rows, Boxes, Region], Tensor]


def row_budget(device: torch.device) -> int:
    """Numbers in the largest coefficient tensor on a device."""
    return ROW_BUDGET_ON_CPU if device.type == "cpu" else ROW_BUDGET


def intermediate_boxes(
    snapshot: Snapshot,
    region: Region,
    known: Boxes | None = None,
    bound: RowBounds | None = None,
    deadline: float = math.inf,
) -> Boxes:
    """CROWN bounds of every node that a nonlinear op reads.

    Each op's interval rule is applied to the tightened boxes before it; only neurons whose relaxation that leaves
    inexact get a backward pass, and the better of both bounds is kept. Nodes where the interval rule is exact, after
    the first layer, need none.

    Args:
        known: bounds that hold already, by place; what is found is cut by them.
        bound: what gives the bounds of rows, with the arguments and the result of `bound_rows`, which it is where None.
        deadline: see `bound_rows`; neurons that it leaves out keep their intervals.
    """
    needed, bound = set(relaxed_inputs(snapshot)), bound or functools.partial(bound_rows, deadline=deadline)
    intervals: list[Interval] = [region.interval()]
    boxes: Boxes = {}
    if 0 in needed:
        boxes[0] = Box(intervals[0].lb, intervals[0].ub)
    for place, node in enumerate(snapshot.nodes[1:], 1):
        interval = node.op.interval(*(intervals[i] for i in node.inputs))
        if place in needed:
            box = Box(interval.lb, interval.ub)
            if known is not None:
                box = Box(torch.maximum(box.lb, known[place].lb), torch.minimum(box.ub, known[place].ub))
            mask = loose_mask(snapshot, place, box)
            if mask.any() and not _exact_by_intervals(snapshot, place, region):
                rows = Rows.of(mask)
                box = rows.write(box, bound(snapshot, place, rows, boxes, region))
            boxes[place] = box
            interval = Interval.from_box(*box)
        intervals.append(interval)
    return boxes


def loose_mask(snapshot: Snapshot, place: int, box: AnyBox) -> Tensor:
    """Neurons of a node whose tighter bounds would help some op that reads it."""
    mask = torch.zeros_like(box.lb, dtype=torch.bool)
    for node in snapshot.nodes:
        if place in node.inputs and not node.op.is_linear:
            mask |= node.op.loose(box)
    return mask


def bound_rows(
    snapshot: Snapshot,
    place: int,
    rows: Rows,
    boxes: Boxes,
    region: Region,
    alphas: Alphas | None = None,
    deadline: float = math.inf,
) -> Tensor:
    """Lower bounds `[2N, B]` of signed unit rows at a node, in chunks that respect the row budget.

    Args:
        deadline: reading of time.perf_counter() after which no chunk is begun; the bounds of its rows are -inf.
    """
    shape = snapshot.nodes[place].shape
    step = _rows_at_a_time(snapshot, place, 2 * rows.index.shape[1], region)
    found: list[Tensor] = []
    for begin in range(0, len(rows), step):
        part = rows.chunk(begin, begin + step)
        if _time_is_up(deadline, found):
            found.append(region.center.new_full((2, len(rows) - begin, len(region.center)), -math.inf))
            break
        A = part.coefficients(shape, region.center.dtype)
        linear = backward(snapshot, place, A, boxes, _chunk(alphas, begin, min(begin + step, len(rows)), len(rows)))
        found.append(region.minimum(linear.A, linear.constant).view(2, len(part), -1))
    return torch.cat(found, 1).flatten(0, 1)


def _time_is_up(deadline: float, done: list[Tensor]) -> bool:
    if deadline == math.inf:
        return False
    if done:
        done[-1].flatten()[:1].cpu()  # a GPU is still at work on what it was given
    return time.perf_counter() >= deadline


def _rows_at_a_time(snapshot: Snapshot, place: int, numbers: int, region: Region) -> int:
    """Rows at a node that fit into the row budget, where each has so many numbers for every one of a layer."""
    widest = max(math.prod(node.shape) for node in snapshot.nodes[: place + 1])
    return max(1, row_budget(region.center.device) // (numbers * widest))


def _chunk(alphas: Alphas | None, begin: int, end: int, count: int) -> Alphas | None:
    if alphas is None:
        return None
    # Rows are stored as [free, 2N, ...]: the lower halves first, then the upper ones.
    return {
        place: torch.cat([alpha[:, begin:end], alpha[:, count + begin : count + end]], 1)
        for place, alpha in alphas.items()
    }


def _exact_by_intervals(snapshot: Snapshot, place: int, region: Region) -> bool:
    """Whether interval rules are exact at a node: one mixing layer after the input, no sums of branches.

    For an l2 ball its image must reach that layer, which only these ops pass on; for an l1 ball they never are.
    """
    ops: list[Op] = []
    while place:
        node = snapshot.nodes[place]
        if not node.op.is_linear or len(node.inputs) != 1:
            return False
        ops.insert(0, node.op)
        (place,) = node.inputs
    mixing = [number for number, op in enumerate(ops) if _mixes(op)]
    if region.ball is None or not mixing:
        return len(mixing) <= 1
    passed_on = all(isinstance(op, Scale | Reshape | Identity) for op in ops[: mixing[0]])
    known = isinstance(ops[mixing[0]], affine.Linear | affine.Conv2d)
    return len(mixing) == 1 and region.ball.norm == "l2" and passed_on and known


def _mixes(op: Op) -> bool:
    return not isinstance(op, Scale | Pad | Reshape | Permute | Identity)


def crown(
    snapshot: Snapshot,
    region: Region,
    boxes: Boxes | None = None,
    alphas: Alphas | None = None,
    deadline: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Lower bounds of all outputs `[B, R]` of a network that ends in its specification, and their scale of rounding.

    Args:
        boxes: intermediate bounds; CROWN's own where None.
        alphas: relaxation parameters for the outputs, the same for all rows (`[free, 1, B, *shape]`); the adaptive
            choice where None.
        deadline: see `bound_rows`.
    """
    boxes = intermediate_boxes(snapshot, region, deadline=deadline) if boxes is None else boxes
    last, rows = len(snapshot.nodes) - 1, output_rows(snapshot, region)
    # What is differentiated stays in memory, whatever the chunks.
    step = len(rows) if torch.is_grad_enabled() else _rows_at_a_time(snapshot, last, rows.shape[1], region)
    low, scale = [rows.new_zeros(0, rows.shape[1])], [rows.new_zeros(0, rows.shape[1])]
    for begin in range(0, len(rows), step):
        if _time_is_up(deadline, low):
            low.append(rows.new_full((len(rows) - begin, rows.shape[1]), -math.inf))
            scale.append(torch.zeros_like(low[-1]))
            break
        linear = backward(snapshot, last, rows[begin : begin + step], boxes, alphas)
        low.append(region.minimum(linear.A, linear.constant))
        scale.append(region.magnitude(linear.A.detach()) + linear.scale)
    return torch.cat(low).T, torch.cat(scale).T


def zero_slopes(snapshot: Snapshot, boxes: Boxes) -> Alphas:
    """Parameters that give every unstable ReLU the lower line 0; for `crown`'s outputs.

    With them no row is below its interval bound on the same boxes, since the lines of the intervals are 0 and ub. The
    adaptive choice can be far below it on networks that were trained for interval bounds (Zhang et al. 2020).
    """
    found = {}
    for place, node in enumerate(snapshot.nodes):
        if isinstance(node.op, ReLU):
            box = boxes[node.inputs[0]]
            found[place] = torch.zeros((1, 1, *box.lb.shape), dtype=box.lb.dtype, device=box.lb.device)
    return found


def output_rows(snapshot: Snapshot, region: Region) -> Tensor:
    """One unit row per output, the same for every example: `[R, B, R]`."""
    (rows,) = snapshot.nodes[-1].shape
    batch = len(region.x)
    identity = torch.eye(rows, dtype=region.center.dtype, device=region.center.device)
    return identity.unsqueeze(1).expand(rows, batch, rows)
