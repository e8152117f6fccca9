"""Cells: the part of a box where chosen activations have chosen signs, as half-spaces; are they empty?

A Lipschitz constant is a supremum over points with a derivative, so a cell without interior plays no part in it. Depth
is measured in shares of the range that a half-space's own function has on the box.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array
from torch import Tensor

THINNEST = 1e-9
"""Cells of no more depth count as empty: of their few last digits rounding decides. In a cell that thin an output
differs from what the rest of its surroundings says by no more than 1e-9 of its range."""


class HalfSpaces(NamedTuple):
    """`A x + c <= 0` for each of M half-spaces of N domains.

    A: `[M, N, d]`; c: `[M, N]`; keep: bool `[M, N]`, False where a domain has fewer half-spaces.
    """

    A: Tensor
    c: Tensor
    keep: Tensor


class Deepest(NamedTuple):
    """How deep within all half-spaces a point of the box can lie.

    depth: upper bound `[N]`, proven by weak duality for whatever multipliers the solver gives; not positive for a cell
        without interior.
    point: `[N, d]`, the solver's deepest point, in the box.
    """

    depth: Tensor
    point: Tensor


BLOCKS = 64
"""Cells in one linear program: fewer cost more calls, more make each of the solver's steps dearer."""


def deepest_points(half_spaces: HalfSpaces, lo: Tensor, hi: Tensor) -> Deepest:
    """Deepest points of N cells in boxes `[N, d]`, by linear programs with a block for each cell (HiGHS)."""
    found = []
    for begin in range(0, max(len(lo), 1), BLOCKS):
        some = slice(begin, begin + BLOCKS)
        found.append(_deepest(HalfSpaces(*(t[:, some] for t in half_spaces)), lo[some], hi[some]))
    return Deepest(*(torch.cat(side) for side in zip(*found, strict=True)))


def _deepest(half_spaces: HalfSpaces, lo: Tensor, hi: Tensor) -> Deepest:
    A, c, keep = (t.transpose(0, 1).double().cpu().numpy() for t in half_spaces)
    middle, radius = ((t.double().cpu().numpy()) for t in ((lo + hi) / 2, (hi - lo) / 2))
    keep = keep.astype(bool)
    scaled = A * radius[:, None, :]
    offset = -(c + np.einsum("nmd,nd->nm", A, middle))
    size = np.abs(scaled).sum(2)
    # A function that is constant on the box cuts all of it or nothing.
    constant = keep & (size <= np.finfo(float).tiny)
    contradiction = (constant & (offset < 0)).any(1)
    keep = keep & ~constant
    size = np.where(keep, size, 1.0)
    rows, bounds = scaled / size[..., None], offset / size
    moves, multipliers = _solve(rows, bounds, keep)
    total = multipliers.sum(1)
    mixed = np.einsum("nm,nmd->nd", multipliers, rows)
    # For all moves u of the box: min_i (b_i - a_i u) <= sum_i w_i (b_i - a_i u) <= w b + |w a|_1, with weights w.
    proven = (multipliers * np.where(keep, bounds, 0.0)).sum(1) + np.abs(mixed).sum(1)
    depth = np.where(total > 0, proven / np.where(total > 0, total, 1.0), np.inf)
    depth = np.where(contradiction, -np.inf, depth)
    point = middle + radius * moves
    return Deepest(lo.new_tensor(depth), lo.new_tensor(point).clamp(lo, hi))


def _solve(rows: np.ndarray, bounds: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(moves `[N, d]` in [-1, 1], multipliers `[N, M]`) of: maximise t_n with rows_n u_n + t_n <= bounds_n."""
    count, _, dims = rows.shape
    block, number = np.nonzero(keep)
    moves, multipliers = np.zeros((count, dims)), np.zeros(keep.shape)
    if not len(block):
        return moves, multipliers
    lines = np.arange(len(block))
    columns = block[:, None] * (dims + 1) + np.arange(dims + 1)
    values = np.concatenate([rows[block, number], np.ones((len(block), 1))], 1)
    matrix = csr_array(
        (values.ravel(), (np.repeat(lines, dims + 1), columns.ravel())), shape=(len(block), count * (dims + 1))
    )
    limits = np.tile([[-1.0, 1.0]] * dims + [[-np.inf, 1.0]], (count, 1))
    cost = np.tile([0.0] * dims + [-1.0], count)
    options = {"primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9}
    found = linprog(cost, matrix, bounds[block, number], bounds=limits, method="highs-ds", options=options)
    if found.x is None:
        # The solver gave up: no multipliers, so nothing is proven empty.
        return moves, multipliers
    multipliers[block, number] = np.maximum(-found.ineqlin.marginals, 0.0)
    return found.x.reshape(count, dims + 1)[:, :dims], multipliers
