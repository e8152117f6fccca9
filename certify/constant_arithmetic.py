"""A network's arithmetic with constants, such as its normalisation, in the form that auto_LiRPA bounds correctly."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

ADD, SUB, MUL, DIV = "add", "sub", "mul", "div"
ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.add, torch.add, "add"), ADD),
    **dict.fromkeys((operator.sub, torch.sub, torch.subtract, "sub", "subtract"), SUB),
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply, "mul", "multiply"), MUL),
    **dict.fromkeys(
        (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide"), DIV
    ),
}

SAME = 1e-9
"""Share of the largest output by which the two forms may differ, in float64."""


def without_broadcasts(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` with constants per channel as 1x1 convolutions, and all others with a batch dimension of one.

    auto_LiRPA's patches cannot be scaled by numbers or by `[C, 1, 1]`, and constants with fewer dimensions than their
    partner confuse its sums.

    Args:
        model: in float64 and evaluation mode; it is not changed.
        x: inputs `[B, *shape]` on which the two forms are compared.

    Returns:
        The rewritten model; `model` itself where it cannot be traced, or where the two would not compute the same.
    """
    try:
        rewritten = _rewritten(model, x)
        same = all(_agree(rewritten(points), model(points)) for points in (x.clone(), torch.rand_like(x)))
    except Exception:  # a forward may raise anything when it is handed a stand-in for numbers
        return model
    return rewritten if same else model


def _agree(got: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().max().clamp(min=1).item()
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=SAME * scale)


def _rewritten(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    traced = torch.fx.symbolic_trace(model)
    interpreter = torch.fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.run(x.clone())
    values = interpreter.env
    moving: set[torch.fx.Node] = set()
    """Nodes that depend on the input."""
    for number, node in enumerate(list(traced.graph.nodes)):
        if (node.op == "placeholder" and not moving) or moving.intersection(node.all_input_nodes):
            moving.add(node)
        found = _line(node, values, moving)
        if found is None:
            continue
        source, slope, intercept = found
        with traced.graph.inserting_before(node):
            new = _as_layers(traced, f"constant_{number}", source, values[source], slope, intercept)
        if new is not None:
            node.replace_all_uses_with(new)
            moving.add(new)
            values[new] = values[node]
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _line(
    node: torch.fx.Node, values: dict[torch.fx.Node, Any], moving: set[torch.fx.Node]
) -> tuple[torch.fx.Node, Tensor, Tensor] | None:
    """(source, slope, intercept) of a node that computes slope * source + intercept with constants, else None."""
    kind = ARITHMETIC.get(node.target) if node.op in ("call_function", "call_method") else None
    if kind is None or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    source, other = (first, second) if first in moving else (second, first)
    if not isinstance(source, torch.fx.Node) or source not in moving or other in moving:
        return None
    constant = values[other] if isinstance(other, torch.fx.Node) else other
    if not isinstance(constant, (int, float, Tensor)) or (kind == DIV and source is second):
        return None
    c = torch.as_tensor(constant).to(values[source])
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    if kind == ADD:
        return source, one, c
    if kind == SUB:
        return (source, one, -c) if source is first else (source, -one, c)
    return source, c if kind == MUL else 1 / c, zero


def _as_layers(
    traced: torch.fx.GraphModule, name: str, source: torch.fx.Node, value: Tensor, slope: Tensor, intercept: Tensor
) -> torch.fx.Node | None:
    """The nodes that compute slope * source + intercept, or None where that changes the shape `value` has."""
    one = (1, *value.shape[1:])
    if value.dim() == 4:
        channels = (1, value.shape[1], 1, 1)
        if _broadcasts(slope, channels):
            conv = nn.Conv2d(value.shape[1], value.shape[1], 1).to(value)
            conv.weight.copy_(torch.diag(slope.expand(channels).flatten())[:, :, None, None])
            conv.bias.copy_(intercept.expand(channels).flatten())  # type: ignore[union-attr]
            traced.add_submodule(name, conv)
            return traced.graph.call_module(name, (source,))
    if not _broadcasts(slope, one):
        return None
    traced.register_buffer(f"{name}_slope", slope.expand(one).clone())
    traced.register_buffer(f"{name}_intercept", intercept.expand(one).clone())
    scaled = traced.graph.call_function(torch.mul, (source, traced.graph.get_attr(f"{name}_slope")))
    return traced.graph.call_function(torch.add, (scaled, traced.graph.get_attr(f"{name}_intercept")))


def _broadcasts(constant: Tensor, shape: tuple[int, ...]) -> bool:
    if constant.dim() > len(shape):
        return False
    pairs = zip(reversed(constant.shape), reversed(shape), strict=False)
    return all(size in (1, whole) for size, whole in pairs)
