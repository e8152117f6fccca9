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
from certify.bounds.crown import intermediate_boxes
from certify.docket import BoundMethod, Problem, Request, splits
from certify.formats.onnx import FormatError, OnnxModel
from certify.formats.vnnlib import Disjunct, Property
from certify.graph import Node, Snapshot, capture
from certify.ops.affine import Linear
from certify.precision import exact_arithmetic, proves, rounding_size
from certify.region import Region
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
    left = [some for group in groups if (some := _unproven(snapshot, model, group, deadline))]
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


def prove_rows(snapshot: Snapshot, region: Region, rows: Rows, deadline: float) -> tuple[Tensor, Tensor]:
    """(lower bounds of `matrix y - limit`, whether the row is proven positive), each `[R]`, over one example's region.

    A disjunct with a proven row is impossible, and its other rows are not bounded further. Every method that proves
    properties of this form goes here.

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
            low, scale = method(ended, region, Request(torch.ones_like(size, dtype=torch.bool), enough))
        best[asked] = torch.maximum(best[asked], torch.where(low[0].isnan(), -math.inf, low[0]))
        proven[asked] |= proves(low, scale, size)[0]
    if splits(snapshot):
        _branch(snapshot, region, rows, best, proven, deadline)
    return best, proven


def _branch(snapshot: Snapshot, region: Region, rows: Rows, best: Tensor, proven: Tensor, deadline: float) -> None:
    """Branch and bound for the rows of open disjuncts, the most promising first; updates `best` and `proven`."""
    method, boxes = BranchAndBound(), None
    # Half of what is left of the time: the long search for a counterexample comes after.
    deadline = min(deadline, time.perf_counter() + (deadline - time.perf_counter()) / 2)
    for row in best.argsort(descending=True).tolist():
        begin = time.perf_counter()
        if begin >= deadline or bool(torch.isin(rows.owner[row], rows.owner[proven])):
            continue
        ended = _with_rows(snapshot, rows.select(torch.tensor([row])))
        with exact_arithmetic(), torch.no_grad():
            boxes = intermediate_boxes(ended, region) if boxes is None else boxes
            size = rounding_size(ended, region)[0]
            until = min(deadline, begin + method.timeout)
            found = method.decide(Problem(ended, region, size, best[row : row + 1], boxes, until))
        proven[row] = found.proven[0]
        best[row] = found.low[0] if proven[row] else torch.maximum(best[row], found.low[0])


def _with_rows(snapshot: Snapshot, rows: Rows) -> Snapshot:
    """The network followed by `matrix y - limit`."""
    *front, last = snapshot.with_spec(rows.matrix.unsqueeze(0)).nodes
    assert isinstance(last.op, Linear)
    bias = -rows.limit if last.op.bias is None else last.op.bias - rows.limit
    return Snapshot((*front, Node(last.name, Linear(last.op.weight, bias), last.inputs, last.shape)))


def _unproven(
    snapshot: Snapshot, model: OnnxModel, group: tuple[Disjunct, ...], deadline: float
) -> tuple[Disjunct, ...]:
    """The disjuncts (with one box) that no bound shows to be impossible."""
    rows = Rows(
        torch.from_numpy(np.concatenate([d.matrix for d in group])),
        torch.from_numpy(np.concatenate([d.limit for d in group])),
        torch.repeat_interleave(torch.arange(len(group)), torch.tensor([len(d.limit) for d in group])),
    )
    lb, ub = (torch.from_numpy(end).view(1, *model.input_shape) for end in (group[0].lb, group[0].ub))
    # The network sees inputs of its own precision: the box holds those that the box's real numbers round to, too.
    low, high = (end.to(model.dtype).double() for end in (lb, ub))
    _, proven = prove_rows(snapshot, Region.between(torch.minimum(lb, low), torch.maximum(ub, high)), rows, deadline)
    shown = set(rows.owner[proven].tolist())
    return tuple(disjunct for number, disjunct in enumerate(group) if number not in shown)


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
