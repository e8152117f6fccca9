"""The leaf of branch and bound: one output of a network whose neurons are split, bounded by a linear program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import OptimizeResult, linprog
from torch import Tensor

from certify.bounds.crown import Boxes
from certify.graph import Snapshot
from certify.program import Affine, Program, Splits
from certify.region import Region

ROUNDING = 1e-12
"""Share of the sizes of its terms by which a bound in float64 is lowered."""

RELAXATION = 1e-9
"""What the constraints of a program without a feasible point are relaxed by, beyond the least that makes one."""

OPTIMAL, INFEASIBLE = 0, 2


def leaf_lp(
    snapshot: Snapshot,
    region: Region,
    boxes: Boxes,
    splits: Splits,
    row: int,
    affine: Mapping[int, Affine] | None = None,
) -> tuple[float, Tensor | None]:
    """(lower bound, minimiser) of output `row` over the points of a box whose neurons obey the splits.

    Exact up to rounding where every unstable ReLU is split; others get their triangle relaxation. The bound is the
    value of the dual at the solver's multipliers, computed here, so it holds whatever the solver's tolerances are.

    Args:
        snapshot: network that ends in its specification, outputs `[1, R]`.
        region: a box around one example.
        boxes: bounds of the inputs of nonlinear ops, valid wherever the splits hold.
        splits: see Splits.
        affine: what `certify.program.affine_matrices` gives for the snapshot, to share it between leaves.

    Returns:
        The bound is inf where the splits contradict each other, and -inf where the solver gave up. The minimiser is an
        input `[*shape]` in the box, in the region's precision, or None where there is none.
    """
    low, values = relaxed_minimum(Program.of(snapshot, region, boxes, splits, affine), row)
    if values is None:
        return low, None
    shape = snapshot.nodes[0].shape
    point = torch.from_numpy(values[: math.prod(shape)]).to(region.center).view(shape)
    return low, point.clamp(region.center[0] - region.radius[0], region.center[0] + region.radius[0])


def relaxed_minimum(program: Program, row: int) -> tuple[float, np.ndarray | None]:
    """(lower bound, values of the variables at the minimum) of a row, binaries relaxed; see `leaf_lp`."""
    found = relaxed(program, row)
    return found.low, found.values


@dataclasses.dataclass(frozen=True)
class Relaxed:
    """Minimum of a row of a program whose binaries are relaxed.

    Attributes:
        low: rigorous lower bound; inf where the program is empty, -inf where the solver gave up.
        values: of the variables at the minimum, `[V]`; None without one.
        multipliers: of the constraints, `[M]`, not negative; None without a minimum.
    """

    low: float
    values: np.ndarray | None = None
    multipliers: np.ndarray | None = None


def relaxed(program: Program, row: int, seconds: float = math.inf) -> Relaxed:
    """The minimum of a row, binaries relaxed; the solver gives up after `seconds`."""
    cost = program.rows[[row]].toarray()[0]
    found = _solve(program, cost, seconds)
    if found.status == INFEASIBLE:
        excess = _elastic(program)
        slack = np.append(np.zeros(len(program.lb)), 1.0)
        solution = _solve(excess, slack, seconds)
        if solution.status != OPTIMAL:
            return Relaxed(-np.inf)
        least = _dual_bound(excess, slack, solution)
        if math.isfinite(least) and least > 0:
            return Relaxed(np.inf)
        # Feasible as far as rounding can tell: a little more room keeps the bound valid and makes it computable.
        program = dataclasses.replace(program, limit=program.limit + solution.fun + RELAXATION)
        found = _solve(program, cost, seconds)
    if found.status != OPTIMAL:
        return Relaxed(-np.inf)
    low = _dual_bound(program, cost, found) + float(program.constants[row])
    if not math.isfinite(low):
        return Relaxed(-np.inf)
    return Relaxed(low, found.x, np.maximum(-found.ineqlin.marginals, 0.0))


def _solve(program: Program, cost: np.ndarray, seconds: float) -> OptimizeResult:
    bounds = np.stack([program.lb, program.ub], 1)
    # A limit of 0 would be none.
    limits = {"time_limit": max(seconds, 1e-3)} if seconds < math.inf else {}
    return linprog(cost, A_ub=program.matrix, b_ub=program.limit, bounds=bounds, method="highs", options=limits)


def _dual_bound(program: Program, cost: np.ndarray, solution: OptimizeResult) -> float:
    """Lower bound of `cost v` on the program, from multipliers that need not be optimal or exact.

    For any m >= 0 the minimum is at least that of cost v + m (matrix v - limit) over the variables' bounds
    (Neumaier and Shcherbina 2004).
    """
    multipliers = np.maximum(-solution.ineqlin.marginals, 0.0)
    reduced = cost + program.matrix.T @ multipliers
    terms = np.minimum(reduced * program.lb, reduced * program.ub)
    size = np.maximum(np.abs(program.lb), np.abs(program.ub))
    scale = (np.abs(cost) + np.abs(program.matrix).T @ multipliers) @ size + np.abs(program.limit) @ multipliers
    return float(terms.sum() - program.limit @ multipliers - ROUNDING * scale)


def _elastic(program: Program) -> Program:
    """The program with one more variable, by which all constraints may be exceeded."""
    matrix = sp.hstack([program.matrix, np.full((len(program.limit), 1), -1.0)], "csr")
    widest = np.abs(program.matrix) @ np.maximum(np.abs(program.lb), np.abs(program.ub)) + np.abs(program.limit)
    return dataclasses.replace(
        program,
        matrix=sp.csr_array(matrix),
        lb=np.append(program.lb, 0.0),
        ub=np.append(program.ub, widest.max(initial=0.0)),
        binary=np.append(program.binary, False),
    )
