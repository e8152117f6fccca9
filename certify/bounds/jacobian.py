"""Bounds of a network's Jacobian over a region: linear bound propagation on the graph of its derivative.

The derivative of a row of the outputs is itself a network: reverse-mode differentiation, whose input is the row, whose
layers are the transposed ones, and whose only nonlinearities are Gates, products with factors that the region leaves
open. `gradient_graph` builds it from the ops' `gradient` rules, and the bound methods for networks bound it: intervals,
or CROWN with its rule that only numbers which some relaxation would use get a backward pass; for a ReLU network these
are the gradients of unknown sign at unstable neurons. Source: Shi et al. 2022 (arXiv 2210.07394), section 3.

Besides B, R and K: N problems, each a row of the outputs over the region of one example or domain. A batch of the
gradient graph is made of problems, since the bounds of gradients depend on the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attacks.threat import euclidean_norm
from certify.bounds.crown import Boxes, Rows, backward, bound_rows, intermediate_boxes, output_rows
from certify.bounds.interval import interval_walk
from certify.graph import Node, Snapshot
from certify.interval import Interval
from certify.op import Activation, AnyBox, Box, Lines
from certify.ops.affine import Linear
from certify.ops.gate import Gate
from certify.ops.merge import Add
from certify.ops.reshape import Identity, Reshape
from certify.region import Region

Propagation = Literal["interval", "recurjac", "crown"]
PROPAGATIONS: tuple[Propagation, ...] = ("interval", "recurjac", "crown")

DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
"""Norm of a row of the Jacobian that answers to a norm of the input: |J d| <= ||J||_dual ||d||."""


class GradientGraph(NamedTuple):
    """The derivative as a network.

    Attributes:
        snapshot: maps a row `[N, K]` to its gradient `[N, *input]`.
        places: where the gradient in the value of a node of the original network stands, by the node's place.
    """

    snapshot: Snapshot
    places: dict[int, int]


def gradient_graph(snapshot: Snapshot, boxes: Boxes) -> GradientGraph:
    """The network that maps a row to its gradient anywhere in the boxes.

    Args:
        boxes: of the inputs of all nonlinear ops, `[N, *shape]`.

    Raises:
        UnsupportedOp: an op without a rule for its derivative.
    """
    last = len(snapshot.nodes) - 1
    nodes = [Node("row", Identity(), (), snapshot.nodes[last].shape)]
    arrived: dict[int, list[int]] = {last: [0]}
    places: dict[int, int] = {}
    for place in range(last, -1, -1):
        if place not in arrived:
            continue
        places[place] = _sum(nodes, arrived.pop(place))
        node = snapshot.nodes[place]
        if not place:
            break
        for i, op in zip(node.inputs, node.op.gradient([boxes.get(i) for i in node.inputs]), strict=True):
            nodes.append(Node(f"gradient of {node.name}", op, (places[place],), snapshot.nodes[i].shape))
            arrived.setdefault(i, []).append(len(nodes) - 1)
    return GradientGraph(Snapshot(tuple(nodes)), places)


def _sum(nodes: list[Node], places: Sequence[int]) -> int:
    """Append the sum of what arrives from several readers; its place."""
    total, *others = places
    for place in others:
        nodes.append(Node("sum of gradients", Add(), (total, place), nodes[place].shape))
        total = len(nodes) - 1
    return total


class RowNorms(NamedTuple):
    """Upper bounds of norms, and what they owe to the activations.

    Attributes:
        ub: `[N]`.
        slack: what deciding the factors of each activation may gain: how far they let its products range, times the
            products' coefficients in the bound, `[N, *shape]` by the activation's place. Empty for intervals.
    """

    ub: Tensor
    slack: dict[int, Tensor]


def row_norms(snapshot: Snapshot, boxes: Boxes, rows: Tensor, norm: str, method: Propagation) -> RowNorms:
    """Upper bounds of the dual norm of row . J for every J of the region.

    Args:
        boxes: of the inputs of the network's nonlinear ops, `[N, *shape]`.
        rows: `[N, K]`.
        norm: of the input: "linf" bounds the sum of |J_j|, "l2" its Euclidean norm, "l1" the greatest |J_j|.
        method: "interval"; "crown": the best lines of every product; "recurjac": constant lines where the sign is
            unknown (Zhang et al. 2019, backward direction).
    """
    graph, places = gradient_graph(snapshot, boxes)
    start = exactly(rows)
    if method == "interval":
        box, _ = interval_walk(graph, start.interval(), keep_boxes=False)
        return RowNorms(largest(box, norm), {})
    graph = with_propagation(with_norm(graph, rows, norm), method)
    found = intermediate_boxes(graph, start)
    ub = largest(found[len(graph.nodes) - 3], norm)
    coefficients: dict[int, Tensor] = {}
    linear = backward(graph, len(graph.nodes) - 1, output_rows(graph, start), found, record=coefficients)
    if norm != "l1":
        jointly = -start.minimum(linear.A, linear.constant)[0]
        if norm == "l2":
            # Each square, and each of the two products of its upper line, may have vanished below the smallest number.
            entries = graph.nodes[-2].shape[0]
            jointly = (jointly.clamp(min=0) + 3 * entries * torch.finfo(jointly.dtype).tiny).sqrt()
        ub = torch.minimum(ub, jointly)
    return RowNorms(ub, _slack(graph, places, found, coefficients))


def entry_bounds(snapshot: Snapshot, boxes: Boxes, rows: Tensor, method: Propagation) -> Box:
    """Bounds of every entry of row . J, each `[N, *input]`; arguments as in `row_norms`."""
    graph, _ = gradient_graph(snapshot, boxes)
    start = exactly(rows)
    graph = with_propagation(graph, method)
    interval, _ = interval_walk(graph, start.interval(), keep_boxes=False)
    box = Box(interval.lb, interval.ub)
    if method == "interval":
        return box
    last = len(graph.nodes) - 1
    everything = Rows.of(torch.ones_like(box.lb, dtype=torch.bool))
    return everything.write(box, bound_rows(graph, last, everything, intermediate_boxes(graph, start), start))


def _slack(graph: Snapshot, places: dict[int, int], found: Boxes, coefficients: dict[int, Tensor]) -> dict[int, Tensor]:
    slack = {}
    origin = {at: place for place, at in places.items()}
    for at, A in coefficients.items():
        node = graph.nodes[at]
        if isinstance(node.op, Gate) and node.inputs[0] in origin:
            box = found[node.inputs[0]]
            slack[origin[node.inputs[0]]] = (
                A[0].abs() * torch.maximum(-box.lb, box.ub) * (node.op.upper - node.op.lower)
            )
    return slack


def exactly(rows: Tensor) -> Region:
    """The region of the rows alone."""
    return Region(rows, torch.zeros_like(rows), rows)


def largest(box: AnyBox, norm: str) -> Tensor:
    """The dual norm of the largest magnitudes of a box's entries, `[N]`."""
    magnitude = torch.maximum(-box.lb, box.ub).flatten(1)
    return euclidean_norm(magnitude, (1,)) if norm == "l2" else torch.linalg.vector_norm(magnitude, DUAL[norm], dim=1)


def with_norm(graph: Snapshot, rows: Tensor, norm: str) -> Snapshot:
    """The graph followed by minus the sum of |J_j| (linf) or of J_j^2 (l2), whose lower bound is asked for.

    |J| is the greatest s * J for s in [-1, 1], so a Gate has the best lines above it. For l1 the norm is read from the
    boxes of the entries, which the squares ask for.
    """
    last = len(graph.nodes) - 1
    shape = graph.nodes[last].shape
    size = int(torch.Size(shape).numel())
    one = rows.new_ones(())
    return Snapshot(
        (
            *graph.nodes,
            Node("entries", Reshape(shape, (size,)), (last,), (size,)),
            Node("magnitudes", Gate(-one, one) if norm == "linf" else Square(), (last + 1,), (size,)),
            Node("norm", Linear(rows.new_full((1, size), -1.0)), (last + 2,), (1,)),
        )
    )


def with_propagation(graph: Snapshot, method: Propagation) -> Snapshot:
    """The graph with the lines of the method."""
    if method != "recurjac":
        return graph
    return Snapshot(tuple(replace(n, op=n.op.flattened()) if isinstance(n.op, Gate) else n for n in graph.nodes))


@dataclass(frozen=True)
class Square(Activation):
    """v^2: the chord above, the tangent in the middle below."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].square()

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        least = torch.zeros_like(box.center).clamp(box.lb, box.ub)
        return Interval.from_box(least.square(), torch.maximum(box.lb.square(), box.ub.square()))

    def lines(self, box: AnyBox, alpha: Tensor | None = None) -> Lines:
        total, middle = box.lb + box.ub, (box.lb + box.ub) / 2
        return Lines(total, -middle.square(), total, -box.lb * box.ub)
