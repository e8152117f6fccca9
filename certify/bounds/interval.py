"""Interval bound propagation (Gowal et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from certify.bounds.crown import Boxes, relaxed_inputs
from certify.graph import Snapshot
from certify.interval import BoxesAndPoints, Interval
from certify.ops.affine import Linear
from certify.region import Region

State = TypeVar("State", Interval, BoxesAndPoints)


def interval_walk(snapshot: Snapshot, start: Interval, keep_boxes: bool = True) -> tuple[Interval, Boxes]:
    """(box of the outputs, boxes of every node that a nonlinear op reads, if `keep_boxes`)."""
    boxes: Boxes = {}

    def keep(place: int, value: Interval) -> None:
        boxes[place] = value

    return _walk(snapshot, start, "interval", keep if keep_boxes else None), boxes


def interval_walk_with_points(
    snapshot: Snapshot, start: BoxesAndPoints, keep_boxes: bool = True
) -> tuple[BoxesAndPoints, Boxes]:
    """`interval_walk` that evaluates points on its way, in the same calls as the boxes' centres."""
    boxes: Boxes = {}

    def keep(place: int, value: BoxesAndPoints) -> None:
        boxes[place] = value.boxes

    return _walk(snapshot, start, "interval_and_points", keep if keep_boxes else None), boxes


def _walk(snapshot: Snapshot, start: State, rule: str, keep: Callable[[int, State], None] | None) -> State:
    """Value of the last node by the ops' `rule`; `keep` is shown what nonlinear ops read."""
    needed = set(relaxed_inputs(snapshot)) if keep else set()
    last_use = snapshot.last_uses()
    values: list[State | None] = [start]
    for place, node in enumerate(snapshot.nodes):
        if place:
            values.append(getattr(node.op, rule)(*(values[i] for i in node.inputs)))
        value = values[place]
        assert value is not None
        if keep and place in needed:
            keep(place, value)
        for i in node.inputs:
            if last_use[i] == place:
                values[i] = None
    assert values[-1] is not None
    return values[-1]


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
    return _margins(last, last.forward(box.center), box.radius, y)


def margins_and_logits(last: Linear, hidden: BoxesAndPoints, y: Tensor) -> tuple[Tensor, Tensor]:
    """(`margins` of the boxes `[B, K]`, logits of the points `[P, K]`)."""
    logits = last.forward(hidden.values)
    count = len(hidden.radius)
    return _margins(last, logits[:count], hidden.radius, y), logits[count:]


def _margins(last: Linear, logits: Tensor, radius: Tensor, y: Tensor) -> Tensor:
    """`margins`, from the logits of the box's centre and its radius."""
    weight = last.weight
    center = logits.gather(1, y.unsqueeze(1)) - logits
    if len(y) > len(weight):
        # All K^2 differences once, then one product for the batch: cheaper than rows per example.
        differences = (weight.unsqueeze(1) - weight.unsqueeze(0)).abs()
        spread = torch.nn.functional.linear(radius, differences.flatten(0, 1)).view(len(y), *differences.shape[:2])
        return center - spread[torch.arange(len(y), device=y.device), y]
    differences = (weight[y].unsqueeze(1) - weight).abs()
    return center - torch.einsum("bkn,bn->bk", differences, radius)
