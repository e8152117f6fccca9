"""Answers to the question whether a network can violate a property: sat, unsat or unknown, as in VNN-COMP.

sat comes with a counterexample that onnxruntime confirms without tolerance; unsat rests on bounds that prove every
disjunct of the property impossible.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attacks.ascent import Ascent, Task, ascend
from attacks.losses import targeted_margin
from attacks.mode import attack_mode
from attacks.region import BoxRegion
from attacks.threat import LinfBall
from certify.bab.max_pool import append_maximum, splits
from certify.bounds.crown import intermediate_boxes
from certify.docket import BoundMethod, Problem, Request
from certify.formats.onnx import FormatError, OnnxModel
from certify.formats.vnnlib import Disjunct, Property
from certify.graph import Node, Snapshot
from certify.ops.affine import Linear
from certify.precision import exact_arithmetic, proves, rounding_size
from certify.region import Region
from certify.tracing import capture
from certify.verdict import SoundnessError
from certify.verifiers import crown, ibp
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.bab import BranchAndBound

SHORT = Ascent(steps=20, step_size=0.5, decay=0.1, decay_at=(0.5, 0.8), unit="box")
LONG = Ascent(steps=100, step_size=0.5, decay=0.1, decay_at=(0.5, 0.8), unit="box", keep="best")
"""The search before the bounds ends at a first violation; the one after them seeks the greatest, which rounding that
differs between torch and onnxruntime does not undo."""

RESTARTS = 10
ROWS = 32
"""Pairs of disjunct and restart that are searched at a time; the deadline is looked at in between."""

PROPOSED = 8
"""Points of a run that onnxruntime is asked about."""


@dataclass(frozen=True)
class Answer:
    """What was found out.

    Attributes:
        status: "sat": the property can be violated. "unsat": it cannot. "timeout", "unknown": neither was shown.
        x, y: the counterexample and onnxruntime's outputs for it, float64; only where sat. Every x lies in the
            property's box as it stands, and is a number that rounds to the network's input.
    """

    status: Literal["sat", "unsat", "timeout", "unknown"]
    x: np.ndarray | None = None
    y: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.status == "sat") != (self.x is not None and self.y is not None):
            raise SoundnessError(f"an answer has a counterexample exactly where it is sat; this one is {self.status}")


def answer(model: OnnxModel, prop: Property, timeout: float = math.inf) -> Answer:
    """Search a counterexample shortly, bound, and search longer for what is not proven; `timeout` in seconds.

    Raises:
        FormatError: the property is about another number of inputs or outputs.
        UnsupportedOp, CaptureError: a network without bound rules.
    """
    deadline = time.perf_counter() + timeout
    _check_sizes(model, prop)
    groups = _by_box(prop)
    snapshot = capture(copy.deepcopy(model.network).double(), _zeros(model).double()).snapshot().without_gradient()
    for group in groups:
        if (found := _confirmed(model, prop, _search(model, group, SHORT, 1, deadline))) is not None:
            return found
    left = []
    for group in groups:
        some, points = _unproven(snapshot, model, group, deadline)
        if (found := _confirmed(model, prop, iter(points))) is not None:
            return found
        left += [some] if some else []
    if not left:
        return Answer("unsat")
    for group in left:
        if (found := _confirmed(model, prop, _search(model, group, LONG, RESTARTS, deadline))) is not None:
            return found
    return Answer("timeout" if time.perf_counter() >= deadline else "unknown")


class Rows(NamedTuple):
    """Conditions of a counterexample, `matrix y <= limit`, of which each disjunct needs all.

    Attributes:
        matrix, limit: float64 `[R, K]` and `[R]`. owner: number of the disjunct that a row belongs to, `[R]`.
    """

    matrix: Tensor
    limit: Tensor
    owner: Tensor

    def select(self, which: Tensor) -> Rows:
        return Rows(self.matrix[which], self.limit[which], self.owner[which])


class Proofs(NamedTuple):
    """What is shown about rows over a region.

    Attributes:
        low: lower bounds of `matrix y - limit`; proven: rows that are positive everywhere; each `[R]`.
        impossible: disjuncts of which no point meets all rows: those with a proven row, and those where everywhere
            some row, not always the same one, is positive.
        points: inputs `[*shape]` that may meet all rows of a disjunct.
    """

    low: Tensor
    proven: Tensor
    impossible: set[int]
    points: list[Tensor]


def prove_rows(snapshot: Snapshot, region: Region, rows: Rows, deadline: float) -> Proofs:
    """Prove disjuncts impossible over one example's region, by one of their rows where possible.

    The other rows of such a disjunct are not bounded further. Every method that proves properties of this form goes
    here.

    Args:
        snapshot: the network, in float64.
        region: box of the inputs, a batch of one, in float64.
        deadline: reading of time.perf_counter() after which nothing new is begun.
    """
    methods: tuple[BoundMethod, ...] = (ibp.bound, crown.bound, AlphaCROWN().bound)
    best = torch.full_like(rows.limit, -math.inf)
    proven = torch.zeros_like(rows.limit, dtype=torch.bool)
    for method in methods:
        asked = (~torch.isin(rows.owner, rows.owner[proven])).nonzero().flatten()
        if not len(asked) or time.perf_counter() >= deadline:
            break
        part = rows.select(asked)
        ended = _with_rows(snapshot, part)
        size = rounding_size(ended, region)

        def enough(low: Tensor, scale: Tensor, size: Tensor = size, owner: Tensor = part.owner) -> bool:
            shown = owner[proves(low, scale, size)[0]]
            return time.perf_counter() >= deadline or bool(torch.isin(owner, shown).all())

        with exact_arithmetic(), torch.no_grad():
            low, scale = method(ended, region, Request(torch.ones_like(size, dtype=torch.bool), enough, deadline))
        best[asked] = torch.maximum(best[asked], torch.where(low[0].isnan(), -math.inf, low[0]))
        proven[asked] |= proves(low, scale, size)[0]
    proofs = Proofs(best, proven, set(rows.owner[proven].tolist()), [])
    if splits(snapshot):
        _branch(snapshot, region, rows, proofs, deadline)
    return proofs


def _branch(snapshot: Snapshot, region: Region, rows: Rows, proofs: Proofs, deadline: float) -> None:
    """Branch and bound for open disjuncts, the most promising first; updates the proofs."""
    method, boxes, tried = BranchAndBound(), None, set(proofs.impossible)
    # Half of what is left of the time: the long search for a counterexample comes after.
    deadline = min(deadline, time.perf_counter() + (deadline - time.perf_counter()) / 2)
    for row in proofs.low.argsort(descending=True).tolist():
        begin, owner = time.perf_counter(), int(rows.owner[row])
        mine = (rows.owner == owner).nonzero().flatten()
        if begin >= deadline or owner in tried:
            continue
        tried.add(owner)
        ended = _with_greatest(snapshot, rows.select(mine))
        with exact_arithmetic(), torch.no_grad():
            if len(mine) == 1 and boxes is None:
                boxes = intermediate_boxes(ended, region, deadline=deadline)  # of the hidden neurons, whatever the row
            size = rounding_size(ended, region)[0]
            until = min(deadline, begin + method.timeout)
            known = boxes if len(mine) == 1 else None
            found = method.decide(Problem(ended, region, size, proofs.low[row : row + 1], known, until))
        if found.witness is not None:
            proofs.points.append(found.witness)
        if bool(found.proven[0]):
            proofs.impossible.add(owner)
        if len(mine) == 1:
            proofs.proven[row] = found.proven[0]
            proofs.low[row] = found.low[0] if found.proven[0] else torch.maximum(proofs.low[row], found.low[0])


def _with_rows(snapshot: Snapshot, rows: Rows) -> Snapshot:
    """The network followed by `matrix y - limit`."""
    *front, last = snapshot.with_spec(rows.matrix.unsqueeze(0)).nodes
    assert isinstance(last.op, Linear)
    bias = -rows.limit if last.op.bias is None else last.op.bias - rows.limit
    return Snapshot((*front, Node(last.name, Linear(last.op.weight, bias), last.inputs, last.shape)))


def _with_greatest(snapshot: Snapshot, rows: Rows) -> Snapshot:
    """The network followed by the greatest of `matrix y - limit`: positive where the disjunct is not satisfied."""
    ended = _with_rows(snapshot, rows)
    if len(rows.limit) == 1:
        return ended
    *front, last = ended.nodes
    assert isinstance(last.op, Linear) and last.op.bias is not None
    nodes = [*front, Node(last.name, Linear(last.op.weight[0], last.op.bias.view(-1)), last.inputs, last.shape)]
    append_maximum(nodes, "greatest", list(torch.arange(len(rows.limit)).unsqueeze(1)), len(nodes) - 1)
    one = Linear(torch.ones(1, 1, 1, dtype=rows.limit.dtype), rows.limit.new_zeros(1, 1))
    return Snapshot((*nodes, Node("row", one, (len(nodes) - 1,), (1,))))


def _unproven(
    snapshot: Snapshot, model: OnnxModel, group: tuple[Disjunct, ...], deadline: float
) -> tuple[tuple[Disjunct, ...], list[Tensor]]:
    """(disjuncts, with one box, that are not shown to be impossible; inputs that may satisfy one of them)."""
    rows = Rows(
        torch.from_numpy(np.concatenate([d.matrix for d in group])),
        torch.from_numpy(np.concatenate([d.limit for d in group])),
        torch.repeat_interleave(torch.arange(len(group)), torch.tensor([len(d.limit) for d in group])),
    )
    lb, ub = (torch.from_numpy(end).view(1, *model.input_shape) for end in (group[0].lb, group[0].ub))
    # The network sees inputs of its own precision: the box holds those that the box's real numbers round to, too.
    low, high = (end.to(model.dtype).double() for end in (lb, ub))
    region = Region.between(torch.minimum(lb, low), torch.maximum(ub, high))
    proofs = prove_rows(snapshot, region, rows, deadline)
    points = [point.clamp(low[0], high[0]).to(model.dtype) for point in proofs.points]
    return tuple(disjunct for number, disjunct in enumerate(group) if number not in proofs.impossible), points


class _Violation(nn.Module):
    """The network as a classifier of `[0, v_1, .., v_D]`: v_d >= 0 exactly where disjunct d is satisfied.

    "Class" 0 is right, and an attack on target d climbs v_d, the least slack of the disjunct's conditions.
    """

    matrix: Tensor
    limit: Tensor

    def __init__(self, model: OnnxModel, group: tuple[Disjunct, ...]) -> None:
        super().__init__()
        self.network = model.network
        most = max(len(disjunct.limit) for disjunct in group)
        places = [np.resize(np.arange(len(d.limit)), most) for d in group]  # repetitions do not change a minimum
        matrix = np.stack([d.matrix[place] for d, place in zip(group, places, strict=True)])
        limit = np.stack([d.limit[place] for d, place in zip(group, places, strict=True)])
        self.register_buffer("matrix", torch.from_numpy(matrix).to(model.dtype))
        self.register_buffer("limit", torch.from_numpy(limit).to(model.dtype))

    def forward(self, x: Tensor) -> Tensor:
        slack = self.limit - torch.einsum("dmk,bk->bdm", self.matrix, self.network(x))
        return torch.cat([slack.new_zeros(len(x), 1), slack.amin(2)], 1)


def _search(
    model: OnnxModel, group: tuple[Disjunct, ...], plan: Ascent, restarts: int, deadline: float
) -> Iterator[Tensor]:
    """Inputs that may violate one of the disjuncts, which share their box; the most promising of a run first."""
    # Nearest, not inward: exactly the inputs of the network's precision that numbers of the box round to.
    lo, hi = (torch.from_numpy(end).to(model.dtype).view(1, *model.input_shape) for end in (group[0].lb, group[0].ub))
    violation = _Violation(model, group)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(restarts), 1 + torch.arange(len(group))).view(-1, 2)
    for part in pairs.split(ROWS):
        if time.perf_counter() >= deadline:
            return
        box = BoxRegion(lo, hi, (hi - lo) / 2).select(torch.zeros(len(part), dtype=torch.long))
        start = torch.lerp(box.lo, box.hi, torch.rand(box.lo.shape, generator=generator, dtype=lo.dtype))
        start[part[:, 0] == 0] = (lo + hi) / 2
        start = box.project_(start)
        task = Task(start.clone(), (torch.zeros(len(part), dtype=torch.long), part[:, 1]), LinfBall(0.0, None))
        with attack_mode(violation), exact_arithmetic():
            points, scores = ascend(violation, targeted_margin, task, start, plan, box)
        yield from points[scores.argsort(descending=True)[:PROPOSED]]


def _confirmed(model: OnnxModel, prop: Property, points: Iterator[Tensor]) -> Answer | None:
    """The answer sat for the first point that onnxruntime, too, says to be a counterexample."""
    for point in points:
        y = model.evaluate(point.numpy())
        flat = point.double().flatten().numpy()
        for disjunct in prop.disjuncts:
            # What is reported lies in the box as a real number, and rounds to the network's input.
            x = np.clip(flat, disjunct.lb, disjunct.ub)
            same = bool((torch.from_numpy(x).to(model.dtype).double().numpy() == flat).all())
            if same and disjunct.violated(x, y):
                return Answer("sat", x, y.astype(np.float64))
    return None


def _by_box(prop: Property) -> list[tuple[Disjunct, ...]]:
    """Disjuncts that share their box, together."""
    groups: dict[bytes, list[Disjunct]] = {}
    for disjunct in prop.disjuncts:
        groups.setdefault(disjunct.lb.tobytes() + disjunct.ub.tobytes(), []).append(disjunct)
    return [tuple(group) for group in groups.values()]


def _check_sizes(model: OnnxModel, prop: Property) -> None:
    inputs = math.prod(model.input_shape)
    with torch.no_grad():
        outputs = model.network(_zeros(model)).shape[1]
    if (inputs, outputs) != (prop.inputs, prop.outputs):
        raise FormatError(
            f"the property is about {prop.inputs} inputs and {prop.outputs} outputs, "
            f"the network has {inputs} and {outputs}"
        )


def _zeros(model: OnnxModel) -> Tensor:
    return torch.zeros((1, *model.input_shape), dtype=model.dtype)
