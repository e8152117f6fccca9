"""ReLU shrinkage of SABR: a training-only box that is not sound, hence no op of `certify`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.graph import Snapshot
from certify.interval import Interval
from certify.op import Op
from certify.ops.relu import ReLU


@dataclass(frozen=True)
class ShrunkReLU(Op):
    """ReLU whose box has the upper bound of unstable neurons multiplied by `factor` before it."""

    relu: ReLU
    factor: float

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.relu.forward(*inputs)

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        lb, ub = box.lb, box.ub
        unstable = (lb < 0) & (ub > 0)
        return self.relu.interval(Interval.from_box(lb, torch.where(unstable, self.factor * ub, ub)))


def with_shrunk_relus(snapshot: Snapshot, factor: float) -> Snapshot:
    """The network with shrinking ReLUs; the network itself for the factor 1."""
    if factor == 1:
        return snapshot
    nodes = (
        replace(node, op=ShrunkReLU(node.op, factor)) if isinstance(node.op, ReLU) else node for node in snapshot.nodes
    )
    return Snapshot(tuple(nodes))
