"""Interval bound propagation (Gowal et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.bounds.crown import Boxes, relaxed_inputs
from certify.graph import Snapshot
from certify.interval import Interval
from certify.ops.affine import Linear
from certify.region import Region


def interval_walk(snapshot: Snapshot, start: Interval, keep_boxes: bool = True) -> tuple[Interval, Boxes]:
    """(box of the outputs, boxes of every node that a nonlinear op reads, if `keep_boxes`)."""
    needed = set(relaxed_inputs(snapshot)) if keep_boxes else set()
    last_use = snapshot.last_uses()
    values: list[Interval | None] = [start]
    boxes: Boxes = {}
    for place, node in enumerate(snapshot.nodes):
        if place:
            values.append(node.op.interval(*(values[i] for i in node.inputs)))  # type: ignore[arg-type]
        value = values[place]
        assert value is not None
        if place in needed:
            boxes[place] = value
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
        box, _ = interval_walk(snapshot, region.interval(), keep_boxes=False)
        return box.lb, box.center.detach().abs() + box.radius.detach()
    box, _ = interval_walk(front, region.interval(), keep_boxes=False)
    out = last.op.interval(box)
    with torch.no_grad():
        scale = last.op.absolute(box.center.abs() + box.radius)
        scale = scale if last.op.bias is None else scale + last.op.bias.abs()
    return out.lb, scale


def margins(last: Linear, box: Interval, y: Tensor) -> Tensor:
    """Lower bounds of z_y - z_k for all classes k, `[B, K]`, 0 in column y; z = `last` of a point in `box`.

    The rows W_y - W_k are bounded, not the logits one by one: what rows y and k share cancels first.
    """
    weight = last.weight
    logits = last.forward(box.center)
    center = logits.gather(1, y.unsqueeze(1)) - logits
    if len(y) > len(weight):
        # All K^2 differences once, then one product for the batch: cheaper than rows per example.
        differences = (weight.unsqueeze(1) - weight.unsqueeze(0)).abs()
        spread = torch.nn.functional.linear(box.radius, differences.flatten(0, 1)).view(len(y), *differences.shape[:2])
        return center - spread[torch.arange(len(y), device=y.device), y]
    differences = (weight[y].unsqueeze(1) - weight).abs()
    return center - torch.einsum("bkn,bn->bk", differences, box.radius)
