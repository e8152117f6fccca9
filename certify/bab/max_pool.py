"""Max-pooling as nested ReLUs, so that branch and bound can split it: max(a, b) = b + relu(a - b)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from certify.bab.unstable_core import obstacle
from certify.graph import Node, Snapshot
from certify.op import AffineOp
from certify.ops.max_pool import MaxPool2d
from certify.ops.merge import Add
from certify.ops.relu import ReLU
from certify.ops.select import Select
from certify.program import windows


def splits(snapshot: Snapshot) -> bool:
    """Whether branch and bound can split every nonlinear op of a network."""
    return obstacle(without_max_pool(snapshot)) is None


def without_max_pool(snapshot: Snapshot, device: torch.device | None = None) -> Snapshot:
    """The same network with every MaxPool2d as a tournament of its windows' inputs; itself where there is none."""
    if not any(isinstance(node.op, MaxPool2d) for node in snapshot.nodes):
        return snapshot
    nodes: list[Node] = []
    where: list[int] = []
    for node in snapshot.nodes:
        inputs = tuple(where[i] for i in node.inputs)
        if isinstance(node.op, MaxPool2d):
            append_maximum(nodes, node.name, _picks(node.op, node.shape, device), inputs[0])
        else:
            nodes.append(Node(node.name, node.op, inputs, node.shape))
        where.append(len(nodes) - 1)
    return Snapshot(tuple(nodes))


def append_maximum(nodes: list[Node], name: str, picks: Sequence[Tensor], source: int) -> None:
    """Append the nodes of a tournament: the elementwise maximum of several choices of a node's numbers.

    Args:
        picks: positions in the flat value of node `source`, each of the shape of the result.
    """
    shape = tuple(picks[0].shape)

    def add(part: str, op: AffineOp | Add | ReLU, *inputs: int) -> int:
        nodes.append(Node(f"{name}.{part}", op, inputs, shape))
        return len(nodes) - 1

    left = [add("pick", Select(pick.flatten(), nodes[source].shape, shape), source) for pick in picks]
    while len(left) > 1:
        pairs = zip(left[::2], left[1::2], strict=False)
        odd = left[len(left) // 2 * 2 :]
        left = [add("max", Add(), b, add("relu", ReLU(), add("minus", Add(-1), a, b))) for a, b in pairs] + odd


def _picks(op: MaxPool2d, shape: tuple[int, ...], device: torch.device | None) -> list[Tensor]:
    places = torch.from_numpy(windows(op)).to(device)
    # Outside the image there is nothing to be greatest: a position inside stands twice.
    places = torch.where(places < 0, places.amax(1, keepdim=True), places)
    return [place.reshape(shape) for place in places.T]
