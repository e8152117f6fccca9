"""A snapshot over a box as a mixed-integer linear program, in sparse matrices and float64.

Only what is nonlinear gets variables: the inputs, the output y of every unstable neuron or max-pool window, and binary
variables d for which of its pieces applies. Every other value is an affine expression of these, so affine layers,
stable neurons and residual sums cost no constraint. With the binaries relaxed to [0, 1] a ReLU's constraints are
exactly its triangle relaxation: the linear program of branch and bound and the mixed-integer one are the same matrices.

Encoding of a ReLU with slope a below 0 on l < z < u (Tjeng et al. 2019; a = 0 is theirs):
    y >= z,  y >= a z,  y <= a z + (1 - a) u d,  y <= z - (1 - a) l (1 - d).
Of a maximum of x_i on l_i <= x_i <= u_i with U = max u_i, over the inputs that may be the greatest:
    y >= x_i,  y <= x_i + (U - l_i) (1 - d_i),  sum d_i >= 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from certify.bounds.crown import Boxes
from certify.graph import Node, Snapshot
from certify.op import AnyBox, UnsupportedOp
from certify.ops.max_pool import MaxPool2d
from certify.ops.relu import ReLU
from certify.region import Region

Splits = Mapping[int, Tensor]
"""Signs of split neurons by place of their activation, `[*shape]` or `[1, *shape]`: +1 for z >= 0, -1 for z <= 0, 0
for neurons that are not split."""

CHUNK = 2**22
"""Numbers in the dense pieces through which an affine op becomes a sparse matrix."""

WIDENING = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Share of a box's magnitude by which it is widened, so that no rounding of the box cuts off a point."""


class Affine(NamedTuple):
    """`sum of matrix @ input + constant`: one matrix `[out, in]` per input of the op."""

    matrices: list[sp.csr_array]
    constant: np.ndarray


class Expression(NamedTuple):
    """The values of a node as affine functions of the variables; `matrix` may lack columns that came later."""

    matrix: sp.csr_array
    constant: np.ndarray


@dataclass(frozen=True)
class Program:
    """Minimise `rows[r] v + constants[r]` where `matrix v <= limit`, `lb <= v <= ub`, and some v are whole numbers.

    Attributes:
        rows, constants: outputs of the snapshot, `[R, V]` and `[R]`.
        matrix, limit: `[M, V]` and `[M]`.
        lb, ub: finite bounds of the variables, `[V]`; the inputs come first.
        binary: variables that are 0 or 1, bool `[V]`.
    """

    rows: sp.csr_array
    constants: np.ndarray
    matrix: sp.csr_array
    limit: np.ndarray
    lb: np.ndarray
    ub: np.ndarray
    binary: np.ndarray

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        region: Region,
        boxes: Boxes,
        splits: Splits | None = None,
        affine: Mapping[int, Affine] | None = None,
    ) -> Program:
        """The program of one example.

        Args:
            snapshot: network that ends in its specification.
            region: a box around one example (`[1, *shape]`).
            boxes: bounds of the inputs of nonlinear ops, valid wherever the splits hold.
            affine: what `affine_matrices` gives for the snapshot, for callers with many regions or splits.

        Raises:
            UnsupportedOp: an op that is neither affine nor piecewise linear.
            ValueError: several examples, or a region that is no box.
        """
        if len(region.center) != 1 or region.ball is not None:
            raise ValueError(
                f"a linear program is made for one example and an linf ball; got {len(region.center)} examples"
                + ("" if region.ball is None else f" and an {region.ball.norm} ball")
            )
        affine = affine or affine_matrices(snapshot, region.center.device)
        return _Builder(snapshot, region, boxes, splits or {}, affine).program


def affine_matrices(snapshot: Snapshot, device: torch.device | None = None) -> dict[int, Affine]:
    """The affine ops of a snapshot, whose tensors are on `device` (the CPU where None), as sparse matrices by place."""
    snapshot = snapshot.to(torch.float64).without_gradient()
    sizes = [math.prod(node.shape) for node in snapshot.nodes]
    return {
        place: _affine(node, sizes[place], max(sizes[i] for i in (place, *node.inputs)), device)
        for place, node in enumerate(snapshot.nodes)
        if place and node.op.is_linear
    }


def _affine(node: Node, size: int, widest: int, device: torch.device | None) -> Affine:
    """An op's matrices from its own backward rule, applied to unit rows: no layer type needs a rule here."""
    step = max(1, CHUNK // widest)
    pieces: list[list[sp.csr_array]] = []
    constants = []
    for begin in range(0, size, step):
        count = min(step, size - begin)
        unit = torch.zeros(count, size, dtype=torch.float64, device=device)
        unit[torch.arange(count), begin + torch.arange(count)] = 1.0
        sources, constant = node.op.backward(unit.view(count, 1, *node.shape), [None] * len(node.inputs))
        pieces.append([sp.csr_array(source.reshape(count, -1).cpu().numpy()) for source in sources])
        constants.append(constant[:, 0].cpu().numpy())
    return Affine([sp.vstack(part, "csr") for part in zip(*pieces, strict=True)], np.concatenate(constants))


class _Builder:
    """Walks the snapshot once and collects variables and constraints."""

    def __init__(
        self, snapshot: Snapshot, region: Region, boxes: Boxes, splits: Splits, affine: Mapping[int, Affine]
    ) -> None:
        self.snapshot, self.boxes, self.splits = snapshot, boxes, splits
        self.lb: list[np.ndarray] = []
        self.ub: list[np.ndarray] = []
        self.binary: list[np.ndarray] = []
        self.columns = 0
        self.constraints: list[Expression] = []
        center, radius = (t.double().flatten().cpu().numpy() for t in (region.center, region.radius))
        values = [self._variables(center - radius, center + radius)]
        last_use = snapshot.last_uses()
        for place, node in enumerate(snapshot.nodes[1:], 1):
            inputs = [values[i] for i in node.inputs]
            values.append(self._value(place, node, inputs, affine))
            for i in node.inputs:
                if last_use[i] == place:
                    values[i] = Expression(sp.csr_array((0, 0)), np.zeros(0))
        self.program = self._finished(values[-1])

    def _value(self, place: int, node: Node, inputs: list[Expression], affine: Mapping[int, Affine]) -> Expression:
        if node.op.is_linear:
            found = affine[place]
            terms = [
                Expression(matrix @ self._wide(value), matrix @ value.constant)
                for matrix, value in zip(found.matrices, inputs, strict=True)
            ]
            total = self._sum(*((1.0, term) for term in terms))
            return Expression(total.matrix, total.constant + found.constant)
        lb, ub = _ends(self.boxes[node.inputs[0]])
        if isinstance(node.op, ReLU):
            return self._relu(inputs[0], lb, ub, self._signs(place, len(lb)), node.op.negative_slope)
        if isinstance(node.op, MaxPool2d):
            return self._max_pool(inputs[0], lb, ub, windows(node.op))
        raise UnsupportedOp(
            f"node {node.name!r}: {type(node.op).__name__} is not piecewise linear; "
            "linear programs know affine layers, ReLU, LeakyReLU and MaxPool2d"
        )

    def _relu(self, z: Expression, lb: np.ndarray, ub: np.ndarray, sign: np.ndarray, a: float) -> Expression:
        self._constrain(z, -1.0, (sign > 0) & (lb < 0))
        self._constrain(z, 1.0, (sign < 0) & (ub > 0))
        active = (sign > 0) | ((sign == 0) & (lb >= 0))
        free = np.flatnonzero((sign == 0) & (lb < 0) & (ub > 0))
        inside = _take(z, free)
        low, high = lb[free], ub[free]
        y = self._variables(a * low, high)
        d = self._variables(np.zeros(len(free)), np.ones(len(free)), binary=True)
        self._at_most(self._sum((1.0, inside), (-1.0, y)))
        self._at_most(self._sum((a, inside), (-1.0, y)))
        self._at_most(self._sum((1.0, y), (-a, inside), (-(1 - a) * high, d)))
        rest = self._sum((1.0, y), (-1.0, inside), (-(1 - a) * low, d))
        self._at_most(Expression(rest.matrix, rest.constant + (1 - a) * low))
        factor = np.where(active, 1.0, a)
        factor[free] = 0.0
        return self._sum((factor, z), (1.0, _spread(y, free, len(lb))))

    def _max_pool(self, x: Expression, lb: np.ndarray, ub: np.ndarray, windows: np.ndarray) -> Expression:
        """`windows` is `[outputs, k]`, positions in the input, -1 outside the image."""
        inside = windows >= 0
        low, high = (np.where(inside, end[windows], -np.inf) for end in (lb, ub))
        chosen = low.argmax(1)
        floor, ceiling = low.max(1), high.max(1)
        candidate = inside & (high > floor[:, None])
        candidate[np.arange(len(windows)), chosen] = True
        simple = candidate.sum(1) == 1
        free = np.flatnonzero(~simple)
        y = self._variables(floor[free], ceiling[free])
        owner, member = np.nonzero(candidate[free])
        d = self._variables(np.zeros(len(owner)), np.ones(len(owner)), binary=True)
        each = _take(x, windows[free][owner, member])
        theirs = _take(y, owner)
        gap = ceiling[free][owner] - low[free][owner, member]
        self._at_most(self._sum((1.0, each), (-1.0, theirs)))
        upper = self._sum((1.0, theirs), (-1.0, each), (gap, d))
        self._at_most(Expression(upper.matrix, upper.constant - gap))
        one_of = self._sum((-1.0, _spread(d, owner, len(free))))
        self._at_most(Expression(one_of.matrix, one_of.constant + 1.0))
        only = _take(x, windows[np.arange(len(windows)), chosen])
        return self._sum((simple.astype(float), only), (1.0, _spread(y, free, len(windows))))

    def _signs(self, place: int, size: int) -> np.ndarray:
        signs = self.splits.get(place)
        if signs is None:
            return np.zeros(size)
        if signs.numel() != size:
            raise ValueError(f"splits of place {place}: expected {size} signs, got shape {tuple(signs.shape)}")
        return signs.flatten().cpu().numpy()

    def _variables(self, lb: np.ndarray, ub: np.ndarray, binary: bool = False) -> Expression:
        self.lb.append(lb)
        self.ub.append(ub)
        self.binary.append(np.full(len(lb), binary))
        entries = (np.ones(len(lb)), (np.arange(len(lb)), self.columns + np.arange(len(lb))))
        self.columns += len(lb)
        return Expression(sp.csr_array(entries, shape=(len(lb), self.columns)), np.zeros(len(lb)))

    def _wide(self, value: Expression) -> sp.csr_array:
        """The matrix with a column for each variable so far."""
        matrix = value.matrix
        return sp.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], self.columns))

    def _sum(self, *terms: tuple[float | np.ndarray, Expression]) -> Expression:
        """Sum of expressions, each multiplied by a number or by one number per row."""
        rows = len(terms[0][1].constant)
        matrix, constant = sp.csr_array((rows, self.columns)), np.zeros(rows)
        for factor, value in terms:
            scale = np.broadcast_to(np.asarray(factor, dtype=float), rows)
            matrix = matrix + sp.diags_array(scale) @ self._wide(value)
            constant = constant + scale * value.constant
        return Expression(sp.csr_array(matrix), constant)

    def _at_most(self, value: Expression) -> None:
        """Require every row to be at most 0."""
        if len(value.constant):
            self.constraints.append(value)

    def _constrain(self, z: Expression, sign: float, which: np.ndarray) -> None:
        self._at_most(self._sum((sign, _take(z, np.flatnonzero(which)))))

    def _finished(self, out: Expression) -> Program:
        matrices = [self._wide(value) for value in self.constraints] or [sp.csr_array((0, self.columns))]
        rows = self._wide(out)
        rows.sum_duplicates()
        return Program(
            rows=rows,
            constants=out.constant,
            matrix=sp.csr_array(sp.vstack(matrices, "csr")),
            limit=-np.concatenate([value.constant for value in self.constraints] or [np.zeros(0)]),
            lb=np.concatenate(self.lb),
            ub=np.concatenate(self.ub),
            binary=np.concatenate(self.binary),
        )


def _ends(box: AnyBox) -> tuple[np.ndarray, np.ndarray]:
    """Flat float64 bounds of one example's box, widened outward; crossed ends (an empty domain) are put in order."""
    lb, ub = box.lb.double().flatten(), box.ub.double().flatten()
    pad = WIDENING[box.lb.dtype] * torch.maximum(lb.abs(), ub.abs())
    low, high = torch.minimum(lb, ub) - pad, torch.maximum(lb, ub) + pad
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("a box of the network is not finite, so no linear program can be made of it")
    return low.cpu().numpy(), high.cpu().numpy()


def windows(op: MaxPool2d) -> np.ndarray:
    """Positions in the flat input of each output's window, `[C * L, k]`, -1 outside the image."""
    places = op._places(torch.device("cpu")).T.numpy()
    channels, height, width = op.in_shape
    shift = (np.arange(channels) * height * width)[:, None, None]
    return np.where(places >= 0, places + shift, -1).reshape(-1, places.shape[1])


def _take(value: Expression, rows: np.ndarray) -> Expression:
    return Expression(sp.csr_array(value.matrix[rows]), value.constant[rows])


def _spread(value: Expression, rows: np.ndarray, size: int) -> Expression:
    """Sum of the rows with the same target among `size` rows."""
    entries = (np.ones(len(rows)), (rows, np.arange(len(rows))))
    place = sp.csr_array(entries, shape=(size, len(rows)))
    return Expression(sp.csr_array(place @ value.matrix), place @ value.constant)
