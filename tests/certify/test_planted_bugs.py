"""The soundness check is able to fail: a wrong rule in any op is found by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certify.bounds.crown as crown_module
import certify.ops.min_max as min_max_module
from attacks.threat import Ball, L1Ball, L2Ball, LinfBall
from certify.interval import BallImage, Interval
from certify.op import Activation, AffineOp, Box, Lines
from certify.ops.affine import Conv2d, Linear, Pad, Scale
from certify.ops.average_pool import Average
from certify.ops.batch_norm import BatchNorm
from certify.ops.circular_conv import CircularConv2d
from certify.ops.exponential import Exponential
from certify.ops.max_pool import MaxPool2d
from certify.ops.merge import Add, Concat
from certify.ops.min_max import MinMax
from certify.ops.relu import ReLU
from certify.ops.reshape import Permute, Reshape
from certify.ops.s_shaped import SShaped
from certify.region import Region
from certify.tracing import CaptureError
from tests.certify.networks import KINDS, VARIANTS, layer, network
from tests.certify.soundness import Escape, check, check_rules
from tests.certify.test_soundness import images

RELU = layer(nn.ReLU)
CONV = KINDS["conv"]
MIN_MAX = VARIANTS["min_max"]
LINF = LinfBall(0.15)


def wrap(change: Callable[..., Any]) -> Callable[[Any], Any]:
    """From a correct rule to one whose result is changed by `change(result, op, *arguments)`."""

    def planted(rule: Any) -> Any:
        return lambda op, *args, **kwargs: change(rule(op, *args, **kwargs), op, *args)

    return planted


def lines(change: Callable[[Lines, Box], Lines]) -> Callable[[Any], Any]:
    return wrap(lambda result, op, box, *rest: change(result, box))


def no_constant(result: Tensor, op: object, A: Tensor) -> Tensor:
    return torch.zeros_like(result)


def times(factor: float) -> Callable[[Any], Any]:
    return wrap(lambda result, *_: result * factor)


def upper_lines_without_intercept(result: Lines, box: Box) -> Lines:
    return result._replace(upper_intercept=torch.zeros_like(result.upper_slope))


def lines_swapped(result: Lines, box: Box) -> Lines:
    zero = torch.zeros_like(box.lb)
    lower = zero if result.lower_intercept is None else result.lower_intercept
    return Lines(result.upper_slope, result.upper_intercept, result.lower_slope, lower)


def steep_lower_line(result: Lines, box: Box) -> Lines:
    return result._replace(lower_slope=result.lower_slope + 0.3 * (box.lb < 0))


def flat_chord(result: Lines, box: Box) -> Lines:
    return result._replace(upper_slope=result.upper_slope * 0.8)


def tangents_past_the_limit(rule: Any) -> Any:
    return lambda op, lb, ub: torch.maximum(rule(op, lb, ub), (0.5 * (lb + ub)).clamp(max=0))


def kernel_flipped(rule: Any) -> Any:
    def transpose(op: Conv2d, A: Tensor) -> Tensor:
        return rule(replace(op, weight=op.weight.flip(2)), A)

    return transpose


def upper_interval_of_lower_pool(rule: Any) -> Any:
    return lambda op, box: Interval.from_box(op.forward(box.lb), op.forward(box.center))


def always_dominated(rule: Any) -> Any:
    return lambda op, box, chosen: (rule(op, box, chosen)[0], torch.ones_like(rule(op, box, chosen)[1]))


def low_ceiling(rule: Any) -> Any:
    return lambda op, box, chosen: (op._pool(box.lb)[0], rule(op, box, chosen)[1])


def another_winner(rule: Any) -> Any:
    """The pool's place of the greatest value becomes that of the least."""

    def pool(op: MaxPool2d, x: Tensor) -> tuple[Tensor, Tensor]:
        return rule(op, x)[0], (rule(op, x)[1] + 1) % (op.in_shape[1] * op.in_shape[2])

    return pool


def backward_drops(which: int) -> Callable[[Any], Any]:
    """A sum's backward rule that forgets one branch."""

    def planted(rule: Any) -> Any:
        def backward(op: Any, A: Tensor, boxes: Any, alpha: Tensor | None = None) -> Any:
            sources, constant = rule(op, A, boxes, alpha)
            sources[which] = torch.zeros_like(sources[which])
            return sources, constant

        return backward

    return planted


def sources_reversed(rule: Any) -> Any:
    def backward(op: Any, A: Tensor, boxes: Any, alpha: Tensor | None = None) -> Any:
        sources, constant = rule(op, A, boxes, alpha)
        return sources[::-1], constant

    return backward


def radius_of_first_branch(rule: Any) -> Any:
    return lambda op, *boxes: Interval(
        rule(op, *boxes).center, op.forward(*(b.radius * (n == 0) for n, b in enumerate(boxes)))
    )


def interval_of_upper_end(rule: Any) -> Any:
    return lambda op, box: Interval.from_box(op.forward(box.center), op.forward(box.ub))


def without_dual_norm(rule: Any) -> Any:
    return lambda region, A, constant: (
        torch.einsum("rbn,bn->rb", A.flatten(2), region.x.flatten(1))
        - 0.3 * region.ball.eps_of(region.x).flatten() * region.ball.dual_norm(A.flatten(2), (2,))
        + constant
    )


def minimum_at_center(rule: Any) -> Any:
    return lambda region, A, constant: torch.einsum("rbn,bn->rb", A.flatten(2), region.center.flatten(1)) + constant


def meeting_too_narrow(rule: Any) -> Any:
    return lambda ball, interval, point, row_norm: rule(ball, interval, point, 0.5 * row_norm)


def last_source_only(rule: Any) -> Any:
    """A backward pass that forgets to add up at a fork."""

    class Forgetful(dict):  # type: ignore[type-arg]
        def __contains__(self, key: object) -> bool:
            return False

    def backward(snapshot: Any, start: int, A: Tensor, boxes: Any, alphas: Any = None) -> Any:
        pending: dict[int, Tensor] = {start: A}
        constant = A.new_zeros(A.shape[:2])
        for place in range(start, 0, -1):
            if place in pending:
                node = snapshot.nodes[place]
                sources, added = node.op.backward(pending.pop(place), [boxes.get(i) for i in node.inputs], None)
                constant = constant + added
                pending.update(zip(node.inputs, sources, strict=True))
        return crown_module.Linear(pending[0], constant, constant.abs())

    return backward


BUGS: dict[str, tuple[Any, str, Callable[[Any], Any], list[Any], Ball]] = {
    "linear: radius by signed weights": (
        Linear,
        "absolute",
        lambda rule: lambda op, r: F.linear(r, op.weight),
        [KINDS["linear"], RELU],
        LINF,
    ),
    "linear: no bias in backward": (Linear, "constant", wrap(no_constant), [KINDS["linear"], RELU], LINF),
    "linear: sign of the transpose": (Linear, "transpose", times(-1), [KINDS["linear"], RELU], LINF),
    "linear: rows without bias": (Linear, "rows", wrap(lambda out, *_: Linear(out.weight)), [RELU], LINF),
    "conv: radius by signed weights": (
        Conv2d,
        "absolute",
        lambda rule: lambda op, r: op.forward(r),
        [CONV, RELU],
        LINF,
    ),
    "conv: no bias in backward": (Conv2d, "constant", wrap(no_constant), [CONV, RELU], LINF),
    "conv: kernel flipped in backward": (Conv2d, "transpose", kernel_flipped, [CONV, RELU], LINF),
    "scale: radius not scaled": (Scale, "absolute", lambda rule: lambda op, r: r, [KINDS["constants"], RELU], LINF),
    "scale: shift missing in backward": (Scale, "constant", wrap(no_constant), [KINDS["constants"], RELU], LINF),
    "scale: slope missing in backward": (
        Scale,
        "transpose",
        lambda rule: lambda op, A: A,
        [KINDS["constants"], RELU],
        LINF,
    ),
    "batch norm: mean forgotten": (
        BatchNorm,
        "factors",
        wrap(lambda out, *_: (out[0], out[1] + 1)),
        [KINDS["batch_norm_2d"], RELU],
        LINF,
    ),
    "batch norm: fold forgets the shift": (
        BatchNorm,
        "fold_into",
        wrap(lambda out, op, conv, *_: replace(out, bias=conv.bias)),
        [VARIANTS["conv_batch_norm"], RELU],
        LINF,
    ),
    "pad: wrong side in backward": (
        Pad,
        "transpose",
        wrap(lambda out, *_: out.roll(1, -1)),
        [RELU, KINDS["zero_pad"], RELU],
        LINF,
    ),
    "average: radius halved": (Average, "absolute", times(0.5), [RELU, KINDS["avg_pool"], RELU], LINF),
    "average: transpose doubled": (Average, "transpose", times(2), [RELU, KINDS["avg_pool"], RELU], LINF),
    "reshape: order in backward": (
        Reshape,
        "transpose",
        wrap(lambda out, *_: out.flip(-1)),
        [RELU, KINDS["linear"], RELU],
        LINF,
    ),
    "permute: not undone": (
        Permute,
        "transpose",
        wrap(lambda out, *_: out.transpose(-1, -2)),
        [RELU, KINDS["permute"], RELU],
        LINF,
    ),
    "sum: left branch lost": (Add, "backward", backward_drops(0), [RELU, KINDS["skip"], RELU], LINF),
    "sum: right branch lost": (Add, "backward", backward_drops(1), [RELU, KINDS["skip"], RELU], LINF),
    "difference: branches exchanged": (Add, "backward", sources_reversed, [RELU, KINDS["difference"], RELU], LINF),
    "sum: radius of one branch": (Add, "interval", radius_of_first_branch, [RELU, KINDS["skip"], RELU], LINF),
    "concat: pieces exchanged": (Concat, "backward", sources_reversed, [RELU, KINDS["concat"], RELU], LINF),
    "relu: chord without intercept": (ReLU, "lines", lines(upper_lines_without_intercept), [RELU], LINF),
    "relu: chord too flat": (ReLU, "lines", lines(flat_chord), [RELU, CONV, RELU], LINF),
    "relu: lower line too steep": (ReLU, "lines", lines(steep_lower_line), [RELU, CONV, RELU], LINF),
    "relu: all neurons stable": (ReLU, "loose", wrap(lambda out, *_: torch.zeros_like(out)), [RELU], LINF),
    "relu: interval of the upper half": (ReLU, "interval", interval_of_upper_end, [RELU], LINF),
    "leaky relu: chord too flat": (ReLU, "lines", lines(flat_chord), [KINDS["leaky_relu"], CONV, RELU], LINF),
    "sigmoid: lines exchanged": (SShaped, "lines", lines(lines_swapped), [KINDS["sigmoid"]], LINF),
    "tanh: lines exchanged": (SShaped, "lines", lines(lines_swapped), [KINDS["tanh"]], LINF),
    "sigmoid: upper line without intercept": (
        SShaped,
        "lines",
        lines(upper_lines_without_intercept),
        [KINDS["sigmoid"]],
        LINF,
    ),
    "tanh: tangent beyond its limit": (
        SShaped,
        "_tangent_limit",
        tangents_past_the_limit,
        [CONV, CONV, KINDS["tanh"]],
        LinfBall(0.5),
    ),
    "sigmoid: interval of the upper half": (Activation, "interval", interval_of_upper_end, [KINDS["sigmoid"]], LINF),
    "max pool: interval stops at the centre": (
        MaxPool2d,
        "interval",
        upper_interval_of_lower_pool,
        [RELU, KINDS["max_pool"]],
        LINF,
    ),
    "max pool: dominated everywhere": (MaxPool2d, "_upper", always_dominated, [KINDS["max_pool"]], LINF),
    "max pool: constant from the lower bounds": (MaxPool2d, "_upper", low_ceiling, [KINDS["max_pool"]], LINF),
    "max pool: place outside its window": (MaxPool2d, "_pool", another_winner, [KINDS["max_pool"]], LINF),
    "min max: interval of the upper half": (MinMax, "interval", interval_of_upper_end, [RELU, MIN_MAX], LINF),
    "min max: halves exchanged in backward": (
        MinMax,
        "backward",
        wrap(lambda out, *_: ([out[0][0].roll(2, 2)], out[1])),
        [RELU, MIN_MAX, RELU],
        LINF,
    ),
    "min max: difference of the same ends": (
        min_max_module,
        "_difference",
        lambda rule: lambda box: Box(*(end.chunk(2, 1)[0] - end.chunk(2, 1)[1] for end in (box.lb, box.ub))),
        [RELU, MIN_MAX, RELU],
        LINF,
    ),
    "exponential: not transposed": (
        Exponential,
        "transpose",
        lambda rule: lambda op, A: op.forward(A.flatten(0, 1)).unflatten(0, A.shape[:2]),
        [RELU, VARIANTS["exponential"], RELU],
        LINF,
    ),
    "exponential: radius by signed weights": (
        Exponential,
        "absolute",
        lambda rule: lambda op, r: op.forward(r),
        [RELU, VARIANTS["exponential"], RELU],
        LINF,
    ),
    "circular: not transposed": (
        CircularConv2d,
        "transpose",
        lambda rule: lambda op, A: op.forward(A.flatten(0, 1)).unflatten(0, A.shape[:2]),
        [RELU, VARIANTS["circular_conv"], RELU],
        LINF,
    ),
    "circular: radius by signed weights": (
        CircularConv2d,
        "absolute",
        lambda rule: lambda op, r: op.forward(r),
        [RELU, VARIANTS["circular_conv"], RELU],
        LINF,
    ),
    "affine: backward without the constant": (
        AffineOp,
        "backward",
        wrap(lambda out, *_: (out[0], out[1] * 0)),
        [CONV, RELU],
        LINF,
    ),
    "fork: only one reader counts": (crown_module, "backward", last_source_only, [RELU, KINDS["skip"], RELU], LINF),
    "region: minimum at the centre": (Region, "minimum", minimum_at_center, [RELU], LINF),
    "l2 region: radius too small": (Region, "minimum", without_dual_norm, [CONV], L2Ball(0.5)),
    "l1 region: radius too small": (Region, "minimum", without_dual_norm, [CONV], L1Ball(2.0)),
    "l2 image: radius too small": (BallImage, "meet", meeting_too_narrow, [RELU], L2Ball(0.5)),
}
"""Place of the rule, its name, what becomes of it, blocks of a network that uses it, and a ball."""


def seen(bug: str) -> None:
    """Check networks with the bug's blocks until one shows it."""
    *_, blocks, ball = BUGS[bug]
    for seed in range(4):
        model, x = network(blocks, seed, gain=2.0).double(), images(seed).double()
        check_rules(model, x, ball)
        check(model, x, ball, points=4_000)
        check(model, x, ball.scaled(0.02), points=200)


@pytest.mark.parametrize("bug", BUGS)
def test_the_soundness_check_finds_a_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, plant, _, _ = BUGS[bug]
    monkeypatch.setattr(place, name, plant(getattr(place, name)))
    with pytest.raises((Escape, CaptureError)):
        seen(bug)


def test_the_soundness_check_passes_on_the_same_networks_without_bugs() -> None:
    for bug in list(BUGS)[::9]:
        seen(bug)
