"""The check behind the property tests: points of the ball, sampled and attacked, must not escape a bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.bound import bound
from certify.bounds.crown import Boxes, intermediate_boxes
from certify.bounds.interval import interval_walk
from certify.graph import Snapshot
from certify.op import Activation, Box
from certify.region import Region
from certify.tracing import capture

METHODS: dict[str, dict[str, Any]] = {"ibp": {}, "crown_ibp": {}, "crown": {}, "alpha_crown": {"iterations": 5}}

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}


class Escape(AssertionError):
    """A point of the ball lies outside a bound."""


def check(model: nn.Module, x: Tensor, ball: Ball, points: int = 10_000, methods: dict[str, Any] = METHODS) -> None:
    """Raise Escape if a point of the ball around an example of `x` escapes a bound of the logits or of a hidden node.

    Args:
        points: sampled points, shared among the examples; the points with extreme logits are then attacked.
    """
    snapshot = capture(model, x[:1]).snapshot().without_gradient()
    generator = torch.Generator().manual_seed(0)
    clouds = []
    for i in range(len(x)):
        alone = x[i : i + 1], of_example(ball, i)
        cloud = sampled(*alone, points // len(x), generator)
        clouds.append(torch.cat([cloud, attacked(model, *alone, cloud)]))
    with torch.no_grad():
        values = [node_values(snapshot, cloud) for cloud in clouds]
        logits = [model(cloud) for cloud in clouds]
        region = Region.around(x, ball)
        boxes = {"intervals": interval_walk(snapshot, region.interval())[1]}
        boxes["crown boxes"] = intermediate_boxes(snapshot, region)
        for name, found in boxes.items():
            _check_boxes(name, snapshot, found, values)
    for method, options in methods.items():
        bounds = bound(snapshot, x, ball, method=method, **options)
        for i, value in enumerate(values):
            _inside(method, bounds.lb[i].detach(), bounds.ub[i].detach(), logits[i])
            _inside(f"{method} (captured)", bounds.lb[i].detach(), bounds.ub[i].detach(), value[-1])


def check_rules(model: nn.Module, x: Tensor, ball: Ball, rows: int = 16, points: int = 200) -> None:
    """Raise Escape if the rule of a single op is wrong on its input boxes; much sharper than the bounds of a network.

    Its interval must contain its values, and its backward rows must lie below (for affine ops: on) `A . op(v)`, for
    points v in the boxes and in their corners, for random A and random relaxation parameters.
    """
    snapshot = capture(model, x[:1]).snapshot().without_gradient()
    generator = torch.Generator().manual_seed(0)
    intervals = [Region.around(x, ball).interval()]
    for node in snapshot.nodes[1:]:
        inputs = [intervals[i] for i in node.inputs]
        intervals.append(node.op.interval(*inputs))
        sides = [torch.rand(points, *b.center.shape, generator=generator).mul(2).sub(1).to(x.dtype) for b in inputs]
        for side in sides:
            side[points // 2 :] = side[points // 2 :].sign()
        v = [box.center + box.radius * side for box, side in zip(inputs, sides, strict=True)]
        out = node.op.forward(*(part.flatten(0, 1) for part in v)).unflatten(0, (points, len(x)))
        boxes = [Box(box.lb, box.ub) for box in inputs]
        if all(
            box.ball is None for box in inputs
        ):  # the box of an l2 ball's image is smaller than the image of its box
            for i in range(len(x)):
                _inside(f"interval of {node.name!r}", intervals[-1].lb[i], intervals[-1].ub[i], out[:, i])
        A = torch.randn(rows, *out.shape[1:], generator=generator).to(x.dtype)
        # Half of the rows read one output each: in a sum over many, the slack of one hides the mistake of another.
        single = torch.randint(out[0, 0].numel(), (rows // 2, len(x), 1), generator=generator)
        A[: rows // 2] *= (
            torch.zeros(rows // 2, len(x), out[0, 0].numel()).scatter_(2, single, 1.0).view_as(A[: rows // 2])
        )
        alphas: list[Tensor | None] = [None]
        if isinstance(node.op, Activation) and node.op.free:
            shape = (node.op.free, rows, *v[0].shape[1:])
            alphas += [torch.rand(shape, generator=generator).to(x.dtype), torch.zeros(shape), torch.ones(shape)]
        for alpha, given in [(None, inputs)] + [(alpha, boxes) for alpha in alphas]:
            sources, constant = node.op.backward(A, given, None if alpha is None else alpha.to(x.dtype))
            line = constant + sum(_rows(a, part) for a, part in zip(sources, v, strict=True))
            gap = _rows(A, out) - line
            tolerance = TOLERANCE[x.dtype] * float(_rows(A.abs(), out.abs()).max().clamp(min=1))
            if not bool((gap >= -tolerance).all()) or (node.op.is_linear and not bool((gap <= tolerance).all())):
                raise Escape(f"backward rule of {node.name!r}: gaps from {gap.min():g} to {gap.max():g}")


def _rows(A: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("rbn,pbn->prb", A.flatten(2), v.flatten(2))


def of_example(ball: Ball, i: int) -> Ball:
    """The ball of one example, with a plain number as radius."""
    return replace(ball, eps=float(ball.eps[i])) if isinstance(ball.eps, Tensor) else ball


def node_values(snapshot: Snapshot, x: Tensor) -> list[Tensor]:
    """Values of all nodes at the points `x`."""
    values = [x]
    for node in snapshot.nodes[1:]:
        values.append(node.op.forward(*(values[i] for i in node.inputs)))
    return values


def sampled(x: Tensor, ball: Ball, count: int, generator: torch.Generator) -> Tensor:
    """Points around one example: half of them uniform in the ball, half on its border or in its corners."""
    centers = x.expand(count // 2, *x.shape[1:]).contiguous()
    inner = ball.sample(centers, generator)
    noise = torch.randn(centers.shape, generator=generator, dtype=x.dtype)
    if ball.norm == "linf":
        noise = noise.sign()
    elif ball.norm == "l1":
        # A few pixels take the whole radius.
        noise = noise.pow(7)
    length = ball.eps_of(centers) / _length(noise, ball.norm).clamp(min=1e-12)
    return torch.cat([x, inner, ball.project(centers + noise * length, centers)])


def attacked(model: nn.Module, x: Tensor, ball: Ball, cloud: Tensor, steps: int = 5) -> Tensor:
    """Gradient ascent and descent on each logit and each difference of logits, from the extreme sampled points."""
    with torch.no_grad():
        logits = model(cloud)
        classes = logits.shape[1]
        rows = torch.cat([torch.eye(classes), torch.eye(classes) - torch.eye(classes).roll(1, 0)]).to(x.dtype)
        rows = torch.cat([rows, -rows])
        start = cloud[(logits @ rows.T).argmax(0)]
    centers = x.expand_as(start).contiguous()
    found = [start]
    for _ in range(steps):
        point = found[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad((model(point) * rows).sum(), point)
        found.append(ball.project(point.detach() + ball.steepest(gradient, ball.eps_of(centers).flatten()), centers))
    return torch.cat(found[1:])


def _length(noise: Tensor, norm: str) -> Tensor:
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    return noise.flatten(1).norm(order, dim=1).view(-1, *[1] * (noise.dim() - 1))


def _check_boxes(name: str, snapshot: Snapshot, boxes: Boxes, values: list[list[Tensor]]) -> None:
    for place, box in boxes.items():
        for i, value in enumerate(values):
            _inside(f"{name} of {snapshot.nodes[place].name!r}", box.lb[i], box.ub[i], value[place])


def _inside(what: str, lb: Tensor, ub: Tensor, value: Tensor) -> None:
    tolerance = TOLERANCE[value.dtype] * max(1.0, float(value.abs().max()))
    if not bool(((value >= lb - tolerance) & (value <= ub + tolerance)).all()):
        below, above = float((lb - value).max()), float((value - ub).max())
        raise Escape(f"{what}: a point is {below:g} below or {above:g} above its bound (tolerance {tolerance:g})")
