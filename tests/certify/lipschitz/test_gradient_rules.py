"""The rules for derivatives, op by op: no product with a gradient leaves them, and planted mistakes are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import LinfBall
from certify.interval import Interval
from certify.op import AffineOp, Box, NonNegativeOp
from certify.ops.affine import Conv2d, Linear, Scale
from certify.ops.circular_conv import CircularConv2d
from certify.ops.exponential import Exponential
from certify.ops.gate import Gate
from certify.ops.max_pool import MaxPool2d, Route
from certify.ops.merge import Add, Concat
from certify.ops.min_max import MinMax, Sorted
from certify.ops.relu import ReLU
from certify.ops.s_shaped import SShaped
from certify.ops.silu import SiLU
from certify.region import Region
from certify.tracing import capture
from tests.certify.networks import INPUT, KINDS, VARIANTS, Apply, Block, layer, network

POINTS, ROWS = 60, 12


class Escape(AssertionError):
    """A product with a gradient outside its bounds."""


def check_gradients(model: nn.Module, seed: int) -> None:
    """Raise Escape if the gradient rule of a single op is wrong on the boxes that its inputs have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, *INPUT, generator=generator, dtype=torch.float64)
    snapshot = capture(model.double(), x[:1]).snapshot().without_gradient()
    intervals = [Region.around(x, LinfBall(0.03)).interval()]
    for node in snapshot.nodes[1:]:
        inputs = [intervals[i] for i in node.inputs]
        intervals.append(node.op.interval(*inputs))
        v = [sampled(box, generator).requires_grad_() for box in inputs]
        out = node.op.forward(*(part.flatten(0, 1) for part in v))
        size = (2, *out.shape[1:])
        g_box = Interval(*(torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2)))
        g_box = replace(g_box, radius=g_box.radius.abs() * (torch.rand(size, generator=generator) < 0.5))
        g = sampled(g_box, generator)
        products = torch.autograd.grad(out, v, g.flatten(0, 1))
        ops = node.op.gradient([Box(box.lb, box.ub) for box in inputs])
        for op, product in zip(ops, products, strict=True):
            check_product(f"gradient of {node.name!r}", op, g_box, g, product, generator)


def sampled(box: Interval, generator: torch.Generator) -> Tensor:
    """Points and corners of a box, `[POINTS, B, *shape]`."""
    side = torch.rand(POINTS, *box.center.shape, generator=generator, dtype=torch.float64) * 2 - 1
    side[POINTS // 2 :] = side[POINTS // 2 :].sign()
    return box.center + box.radius * side


def check_product(name: str, op: Any, g_box: Interval, g: Tensor, product: Tensor, generator: torch.Generator) -> None:
    box = op.interval(g_box)
    if bool(((product < box.lb - 1e-9) | (product > box.ub + 1e-9)).any()):
        raise Escape(f"interval of the {name}")
    A = torch.randn(ROWS, *product.shape[1:], generator=generator, dtype=torch.float64)
    # Half of the rows read one entry: in a sum over many, the slack of one hides the mistake of another.
    single = torch.randint(A[0, 0].numel(), (ROWS // 2, 2, 1), generator=generator)
    A[: ROWS // 2] *= torch.zeros(ROWS // 2, 2, A[0, 0].numel()).scatter_(2, single, 1.0).view(ROWS // 2, *A.shape[1:])
    (through,), constant = op.backward(A, [Box(g_box.lb, g_box.ub)])
    line = torch.einsum("rbn,pbn->prb", through.flatten(2), g.flatten(2)) + constant
    value = torch.einsum("rbn,pbn->prb", A.flatten(2), product.flatten(2))
    if bool((line > value + 1e-9).any()):
        raise Escape(f"backward rule of the {name}")


@pytest.mark.parametrize("name", [*KINDS, *VARIANTS])
def test_no_product_with_a_gradient_escapes(name: str):
    check_gradients(network([layer(nn.Tanh), (KINDS | VARIANTS)[name]], 0), 0)


def signed(rule: Any) -> Callable[[AffineOp], AffineOp]:
    return lambda op: op.linear_part()


def result(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """From a right rule to one whose result is changed."""
    return lambda rule: lambda *args: change(rule(*args))


def ends_only(rule: Any) -> Any:
    def gradient(op: Any, boxes: list[Box]) -> list[Gate]:
        ends = torch.stack([op.derivative(boxes[0].lb), op.derivative(boxes[0].ub)])
        return [Gate(ends.amin(0), ends.amax(0))]

    return gradient


def gate(change: Callable[[Gate], Gate]) -> Callable[[Any], Any]:
    return result(lambda ops: [change(ops[0])])


LEAKY = KINDS["leaky_relu"]
WIDE_SILU = layer(lambda: nn.Sequential(Apply(lambda x: 6 * x), nn.SiLU()))
BUGS: dict[str, tuple[type, str, Callable[[Any], Any], Block]] = {
    "linear: signed weights": (Linear, "absolute_part", signed, KINDS["linear"]),
    "conv: signed weights": (Conv2d, "absolute_part", signed, KINDS["conv"]),
    "scale: signed weights": (Scale, "absolute_part", signed, KINDS["constants"]),
    "circular: signed weights": (CircularConv2d, "absolute_part", signed, VARIANTS["circular_conv"]),
    "exponential: signed weights": (Exponential, "absolute_part", signed, VARIANTS["exponential"]),
    "conv: keeps its shift": (Conv2d, "linear_part", lambda rule: lambda op: op, KINDS["conv"]),
    "average: half": (NonNegativeOp, "absolute_part", lambda rule: lambda op: Half(op), KINDS["avg_pool"]),
    "relu: open gates pass on": (ReLU, "gate", result(lambda g: replace(g, lower=g.upper)), KINDS["relu"]),
    "leaky relu: half closed": (ReLU, "gate", result(lambda g: replace(g, lower=(g.lower + g.upper) / 2)), LEAKY),
    "s-shaped: no peak": (SShaped, "gradient", ends_only, KINDS["tanh"]),
    "silu: no turning points": (SiLU, "gradient", ends_only, WIDE_SILU),
    "gate: chord too low": (
        Gate,
        "lines",
        result(lambda lines: lines._replace(upper_intercept=0.9 * lines.upper_intercept)),
        KINDS["relu"],
    ),
    "gate: range too short": (Gate, "interval", result(lambda box: replace(box, radius=0.9 * box.radius)), LEAKY),
    "min_max: halves exchanged": (
        MinMax,
        "gradient",
        gate(lambda s: replace(s, gate=replace(s.gate, lower=1 - s.gate.upper, upper=1 - s.gate.lower))),
        VARIANTS["min_max"],
    ),
    "min_max: never swaps": (
        MinMax,
        "gradient",
        gate(lambda s: replace(s, gate=replace(s.gate, lower=s.gate.upper))),
        VARIANTS["min_max"],
    ),
    "min_max: only one end": (Sorted, "_mixtures", result(lambda both: [both[0], both[0]]), VARIANTS["min_max"]),
    "pool: one maximum only": (
        MaxPool2d,
        "gradient",
        gate(lambda r: replace(r, upper=torch.where(r.lower > 0, r.upper, 0.5 * r.upper))),
        KINDS["max_pool"],
    ),
    "pool: constants dropped": (Route, "backward", result(lambda out: (out[0], 0 * out[1])), KINDS["max_pool"]),
    "difference: sum": (Add, "gradient", result(lambda ops: [ops[0], ops[0]]), KINDS["difference"]),
    "concat: first piece twice": (Concat, "gradient", result(lambda ops: [ops[0], ops[0]]), VARIANTS["concat_pixels"]),
}  # fmt: skip


class Half(NonNegativeOp):
    def __init__(self, op: AffineOp) -> None:
        self.op = op

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.op.forward(*inputs) / 2

    def transpose(self, A: Tensor) -> Tensor:
        return self.op.transpose(A) / 2


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_mistake_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch):
    owner, name, plant, block = BUGS[bug]
    blocks = [layer(nn.Tanh), block, layer(nn.ReLU)]
    check_gradients(network(blocks, 0, gain=2.0), 0)
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises(Escape):
        for seed in range(4):
            check_gradients(network(blocks, seed, gain=2.0), seed)
