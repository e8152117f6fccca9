"""Interval bound propagation (Gowal et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.bounds.crown import Boxes, relaxed_inputs
from certify.graph import Snapshot
from certify.interval import Interval
from certify.op import Box
from certify.ops.affine import Linear
from certify.region import Region


def interval_walk(snapshot: Snapshot, region: Region) -> tuple[Interval, Boxes]:
    """(box of the outputs, boxes of every node that a nonlinear op reads)."""
    needed = set(relaxed_inputs(snapshot))
    last_use = snapshot.last_uses()
    values: list[Interval | None] = [region.interval()]
    boxes: Boxes = {}
    for place, node in enumerate(snapshot.nodes):
        if place:
            values.append(node.op.interval(*(values[i] for i in node.inputs)))  # type: ignore[arg-type]
        value = values[place]
        assert value is not None
        if place in needed:
            boxes[place] = Box(value.lb, value.ub)
        for i in node.inputs:
            if last_use[i] == place:
                values[i] = None
    assert values[-1] is not None
    return values[-1], boxes


def ibp(snapshot: Snapshot, region: Region) -> tuple[Tensor, Tensor]:
    """Lower bounds of all outputs `[B, R]` of a network that ends in its specification, and their scale of rounding."""
    front = Snapshot(snapshot.nodes[:-1])
    last = snapshot.nodes[-1]
    if not isinstance(last.op, Linear) or last.inputs != (len(front.nodes) - 1,):
        box, _ = interval_walk(snapshot, region)
        return box.lb, box.center.detach().abs() + box.radius.detach()
    box, _ = interval_walk(front, region)
    out = last.op.interval(box)
    with torch.no_grad():
        scale = last.op.absolute(box.center.abs() + box.radius)
        scale = scale if last.op.bias is None else scale + last.op.bias.abs()
    return out.lb, scale
