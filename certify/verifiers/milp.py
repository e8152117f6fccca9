"""Mixed-integer programming as a verifier."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from attacks.mode import Model
from attacks.threat import Ball
from certify.bounds.crown import Boxes, crown, intermediate_boxes
from certify.checks import check_problem
from certify.docket import NORMS, Docket, Request
from certify.graph import Snapshot
from certify.interval import Interval
from certify.leaf import relaxed_minimum
from certify.ops.max_pool import MaxPool2d
from certify.ops.relu import ReLU
from certify.program import Program
from certify.region import Region
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields

INTEGRALITY = FEASIBILITY = 2e-6
DUAL = 2e-7
"""Twice the tolerances of HiGHS: how far a binary may be from 0 or 1, a constraint from being met, and a reduced cost
from its sign."""

SMALLEST_ENTRY = 1.01e-9
"""Entries of the matrix up to here are left out: HiGHS takes those up to 1e-9 for 0."""


@VERIFIERS.register("milp")
@dataclass(frozen=True)
class MILP:
    """The exact minimum of every margin by mixed-integer programming.

    Needs: affine layers, ReLU, LeakyReLU and max-pooling; an linf ball; a small net (hundreds of unstable neurons).
    Returns: certified, falsified or unknown, for correctly classified examples; the margin of a certified example is
    the exact one up to the allowance. How: a big-M program (`certify.program`) on CROWN's boxes for every target, those
    with the worst bounds first, solved by HiGHS. A target is proven where the solver's lower bound exceeds what its
    tolerances can do (`reach`); a minimiser counts only if the model misclassifies it. Sound, and complete for margins
    beyond that allowance. Source: Tjeng et al. (2019).

    Args:
        timeout: seconds per example.
        neurons: examples with more unstable neurons than this are left unknown: their program would not end.
    """

    timeout: float = 60.0
    neurons: int = 2000

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    falsifies: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    block: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        check_problem(model, x, y, ball, self.norms)
        return [
            self._decide(model, x[i : i + 1], y[i : i + 1], ball.select(torch.tensor([i], device=x.device)))
            for i in range(len(x))
        ]

    def _decide(self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Verdict:
        docket = Docket(model, x, y, ball, timeout=self.timeout)
        search = _Search(time.perf_counter() + self.timeout, self.neurons)
        docket.prove("milp", search.bound, 1)
        for point in search.minimisers:
            docket.falsify("milp", _Proposal(point), 1)
        (verdict,) = docket.verdicts("milp")
        return verdict


@dataclass(frozen=True)
class _Proposal:
    """An attack that proposes one given point."""

    point: Tensor
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = NORMS

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return ball.project(self.point.to(x), x)


@dataclass
class _Search:
    """Bounds of one example's targets, and the minimisers found on the way."""

    deadline: float
    neurons: int
    minimisers: list[Tensor] = field(default_factory=list)

    def bound(self, snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
        """Exact minima of the rows less the solver's allowance; -inf for rows that were not reached."""
        dtype = region.center.dtype
        snapshot, region = snapshot.to(torch.float64), region.to(torch.float64)
        boxes = intermediate_boxes(snapshot, region, deadline=self.deadline)
        low = torch.full(request.wanted.shape, -math.inf, dtype=torch.float64)
        if not _is_small(snapshot, boxes, self.neurons):
            return low.to(region.center), low.to(region.center)
        program = Program.of(snapshot, region, boxes)
        allowance = reach(snapshot, region, boxes)[0].cpu().numpy() + DUAL * float((program.ub - program.lb).sum())
        rough = crown(snapshot, region, boxes, deadline=self.deadline)[0][0]
        for row in rough.argsort().tolist():
            if not bool(request.wanted[0, row]) or time.perf_counter() >= self.deadline:
                continue
            low[0, row], point = self._minimum(program, row, snapshot.nodes[0].shape)
            low[0, row] -= float(allowance[row])
            if point is not None and float(low[0, row]) <= 0:
                self.minimisers.append(point)
                if float(snapshot(point.unsqueeze(0).to(region.center))[0, row]) < 0:
                    break
        low = low.to(region.center)
        return low.to(dtype), low.abs().to(dtype)

    def _minimum(self, program: Program, row: int, shape: tuple[int, ...]) -> tuple[float, Tensor | None]:
        """(proven lower bound, input of the least value found) of one output."""
        if program.binary.any():
            low, values = self._integer_minimum(program, row)
        else:
            low, values = relaxed_minimum(program, row)
        return low, None if values is None else torch.from_numpy(values[: math.prod(shape)]).view(shape)

    def _integer_minimum(self, program: Program, row: int) -> tuple[float, np.ndarray | None]:
        matrix, limit = without_small_entries(program)
        found = milp(
            program.rows[[row]].toarray()[0],
            integrality=program.binary.astype(int),
            bounds=Bounds(program.lb, program.ub),
            constraints=LinearConstraint(matrix, -np.inf, limit),
            options={"time_limit": max(self.deadline - time.perf_counter(), 0.01), "mip_rel_gap": 0.0},
        )
        # A box is never empty: an infinite bound ("infeasible") would be the solver's error, and proves nothing.
        if found.mip_dual_bound is None or not math.isfinite(found.mip_dual_bound):
            return -math.inf, found.x
        return found.mip_dual_bound + float(program.constants[row]), found.x


def without_small_entries(program: Program) -> tuple[sp.csr_array, np.ndarray]:
    """(matrix, limit) without the entries that the solver would drop, and limits that no point of the box then breaks.

    HiGHS takes entries below its option small_matrix_value, 1e-9, for 0: with large variables that cuts off points.
    """
    small = program.matrix.copy()
    small.data[np.abs(small.data) > SMALLEST_ENTRY] = 0.0
    most = np.maximum(np.abs(program.lb), np.abs(program.ub))
    # The sum of what is dropped rounds by far less than the factor adds.
    return program.matrix - small, program.limit + (abs(small) @ most) * (1 + 1e-9)


def reach(snapshot: Snapshot, region: Region, boxes: Boxes) -> Tensor:
    """How far the outputs of a big-M program may be from the network's within the solver's tolerances: `[1, R]`.

    Every unstable neuron may be off by its big-M times the integrality tolerance plus the feasibility tolerance;
    such errors pass through affine ops with absolute weights, and nonlinear ops do not enlarge them.
    """
    errors = [torch.zeros_like(region.center)]
    for node in snapshot.nodes[1:]:
        reached = [errors[i] for i in node.inputs]
        if node.op.is_linear:
            errors.append(node.op.interval(*(Interval(torch.zeros_like(e), e) for e in reached)).radius)
            continue
        box = boxes[node.inputs[0]]
        size = INTEGRALITY * torch.maximum(box.lb.abs(), box.ub.abs()) + FEASIBILITY
        own = torch.where(node.op.loose(box), size, 0.0)
        if isinstance(node.op, MaxPool2d):
            # The big-M of a window is a difference of two of its inputs.
            errors.append(node.op.forward(reached[0] + 2 * own))
        else:
            errors.append(reached[0] + own)
    return errors[-1]


def _is_small(snapshot: Snapshot, boxes: Boxes, neurons: int) -> bool:
    activations = [node for node in snapshot.nodes[1:] if isinstance(node.op, ReLU | MaxPool2d)]
    return sum(int(node.op.loose(boxes[node.inputs[0]]).sum()) for node in activations) <= neurons
