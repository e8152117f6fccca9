"""Bounds of the Jacobian around one example, for many rows of the outputs at once: CROWN over the open gates alone.

In the gradient's graph (see `jacobian`) only the products at open gates are not linear, those of activations whose
slope the region leaves open. All that lies between them is one linear map, the same for every row of the outputs. It is
written out by sending a unit through the graph for each open gate. CROWN's substitution then runs over a triangular
matrix `[open, open]` in place of the network's layers, with the same lines, so that the bounds are the same: what
thousands of rows would carry through convolutions, two for each pixel's entry, a hundred units carry once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify.bounds.crown import Boxes, Rows, intermediate_boxes, row_budget
from certify.bounds.jacobian import Propagation, exactly, largest, with_norm, with_propagation
from certify.graph import Snapshot
from certify.op import Box
from certify.ops.gate import Gate
from certify.region import Region

MOST_OPEN = 2048
"""Open gates of a core, whose matrix is dense."""


@dataclass(frozen=True)
class Read:
    """Numbers of a node that bounds are asked for, linear in the products at M open gates, for N rows of the outputs.

    Attributes:
        index: their flat numbers in the node, `[size]`.
        products: what each product adds to them, `[M, size]`.
        base: their values where all products are 0, `[N, size]`.
    """

    index: Tensor
    products: Tensor
    base: Tensor


@dataclass(frozen=True)
class Core:
    """The products at the open gates as unknowns.

    Attributes:
        parts: where the gates of a node stand among the M, by the place of the gates' node, in the order of the graph.
        reads: the open gates' own inputs, and the entries of the gradient, by place.
    """

    parts: dict[int, slice]
    reads: dict[int, Read]


def has_core(graph: Snapshot) -> bool:
    """Whether a gradient's graph `[1, ...]` has a core: Gates are its only nonlinear ops, and few of them are open."""
    nonlinear = [node for node in graph.nodes[1:] if not node.op.is_linear]
    gates = [node.op for node in nonlinear if isinstance(node.op, Gate)]
    # A node that two gates read would need two lists of open ones.
    if len(gates) < len(nonlinear) or len({node.inputs for node in nonlinear}) < len(gates):
        return False
    return sum(int((gate.lower < gate.upper).sum()) for gate in gates) <= MOST_OPEN


def shared_row_norms(graph: Snapshot, rows: Tensor, norm: str, method: Propagation) -> Tensor:
    """`jacobian.row_norms` `[N]` for rows `[N, K]` over the region of one example.

    Args:
        graph: the gradient's, over that region, with a core.
    """
    graph = with_propagation(with_norm(graph, rows, norm), method)
    entries = len(graph.nodes) - 3
    core = _core(graph, rows, entries)

    def bound(graph: Snapshot, place: int, which: Rows, found: Boxes, region: Region) -> Tensor:
        return _bounded(graph, core, place, which, found)

    found = intermediate_boxes(graph, exactly(rows), bound=bound)
    ub = largest(found[entries], norm)
    if norm == "l1":
        return ub
    minus = torch.full_like(core.reads[entries].base, -1.0).unsqueeze(0)
    (A,), constant = graph.nodes[entries + 1].op.backward(minus, [found[entries]])
    constant = constant + torch.einsum("rns,ns->rn", A, core.reads[entries].base)
    jointly = -_substituted(graph, core, entries, A @ core.reads[entries].products.T, constant, found)[0]
    return torch.minimum(ub, jointly if norm == "linf" else jointly.clamp(min=0).sqrt())


def _core(graph: Snapshot, rows: Tensor, entries: int) -> Core:
    gates = {place: node.op for place, node in enumerate(graph.nodes[:entries]) if isinstance(node.op, Gate)}
    opened = {place: (gate.lower < gate.upper).flatten().nonzero().flatten() for place, gate in gates.items()}
    parts, count = {}, 0
    for place, index in opened.items():
        parts[place] = slice(count, count + len(index))
        count += len(index)
    reads: dict[int, Read] = {}
    # The rows with all products 0, then each product alone.
    values = [torch.cat([rows, rows.new_zeros(count, rows.shape[1])])]
    for place, node in enumerate(graph.nodes[1 : entries + 1], 1):
        inputs = [values[i] for i in node.inputs]
        if place not in gates:
            values.append(node.op.forward(*inputs))
            continue
        (value,), gate = inputs, gates[place]
        reads[node.inputs[0]] = _read(value, opened[place], len(rows))
        through = (value * torch.where(gate.lower < gate.upper, 0.0, gate.lower)).flatten(1)
        unit = torch.arange(len(rows), len(value), device=rows.device)[parts[place]]
        through[unit, opened[place]] = 1.0
        values.append(through.view_as(value))
    everything = torch.arange(values[entries].shape[1], device=rows.device)
    return Core(parts, reads | {entries: _read(values[entries], everything, len(rows))})


def _read(value: Tensor, index: Tensor, rows: int) -> Read:
    some = value.flatten(1)[:, index]
    return Read(index, some[rows:], some[:rows])


def _bounded(graph: Snapshot, core: Core, place: int, which: Rows, found: Boxes) -> Tensor:
    """Lower bounds `[2R, N]` of signed unit rows at a node, as `crown.bound_rows` gives them."""
    read = core.reads[place]
    # Bounds are asked for at open gates only; their numbers among those.
    columns = torch.searchsorted(read.index, which.index)
    step = max(1, row_budget(columns.device) // (2 * columns.shape[1] * max(1, len(read.products))))
    parts = []
    for some in columns.split(step):
        A, constant = read.products.T[some], read.base.T.gather(0, some)
        low = _substituted(graph, core, place, torch.cat([A, -A]), torch.cat([constant, -constant]), found)
        parts.append(low.view(2, len(some), -1))
    return torch.cat(parts, 1).flatten(0, 1)


def _substituted(graph: Snapshot, core: Core, start: int, A: Tensor, constant: Tensor, found: Boxes) -> Tensor:
    """Lower bounds `[R, N]` of `A products + constant`, of products at gates up to a node; `A` is `[R, N, M]`."""
    for place in reversed(core.parts):
        part, gate, (source,) = core.parts[place], graph.nodes[place].op, graph.nodes[place].inputs
        read, box = core.reads[source], found.get(source)
        if place > start or not len(read.index):
            continue
        assert isinstance(gate, Gate) and box is not None
        opened = Gate(gate.lower.flatten()[read.index], gate.upper.flatten()[read.index], gate.flat)
        around = Box(box.lb.flatten(1)[:, read.index], box.ub.flatten(1)[:, read.index])
        (through,), added = opened.backward(A[..., part], [around])
        constant = constant + added + torch.einsum("rns,ns->rn", through, read.base)
        A = A + through @ read.products.T
    return constant
