"""Calls of a traced model that are other calls in disguise: what is piecewise linear becomes ReLUs, which every bound
knows, and the parts of a value that was split become nodes of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

SPLITS: dict[Any, Callable[..., Any]] = {
    torch.chunk: torch.chunk,
    torch.split: torch.split,
    torch.tensor_split: torch.tensor_split,
    "chunk": torch.chunk,
    "split": torch.split,
    "tensor_split": torch.tensor_split,
}
MAXIMA = (torch.maximum, torch.max, "maximum", "max")
MINIMA = (torch.minimum, torch.min, "minimum", "min")
MAGNITUDES = (torch.abs, "abs", operator.abs, abs)
CLAMPS = (torch.clamp, "clamp", torch.clip, "clip")


def part_of(x: Tensor, split: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Tensor:
    """Part `index` of `split(x, ...)`, a view."""
    part: Tensor = split(x, *args, **kwargs)[index]
    return part


def rewrite(graph: Graph) -> None:
    """Replace, in place, what this file has another form for; every other call stays as it is."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        with graph.inserting_before(node):
            new = _another_form(graph, node)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method") and node.target in SPLITS and not node.users:
            graph.erase_node(node)


def _another_form(graph: Graph, node: Node) -> Node | None:
    def call(target: Callable[..., Any], *args: Any) -> Node:
        return graph.call_function(target, args)

    args, kwargs = node.args, node.kwargs
    if node.target is operator.getitem and _splits(args[0]) and isinstance(args[1], int):
        source: Any = args[0]
        split: Any = SPLITS[source.target]
        return graph.call_function(part_of, (source.args[0], split, args[1], *source.args[1:]), dict(source.kwargs))
    if node.target in MAXIMA + MINIMA and len(args) == 2 and not kwargs and all(isinstance(a, Node) for a in args):
        above = call(F.relu, call(operator.sub, *args))
        if node.target in MAXIMA:
            return call(operator.add, args[1], above)
        return call(operator.sub, args[0], above)
    if node.target in MAGNITUDES and len(args) == 1:
        return call(operator.add, call(F.relu, args[0]), call(F.relu, call(operator.neg, args[0])))
    if node.target in CLAMPS and isinstance(args[0], Node):
        low, high = (args[k] if len(args) > k else kwargs.get(name) for k, name in ((1, "min"), (2, "max")))
        return _clamped(call, args[0], low, high)
    return None


def _clamped(call: Callable[..., Node], x: Node, low: Any, high: Any) -> Node:
    if low is not None:
        x = call(operator.add, call(F.relu, call(operator.sub, x, low)), low)
    if high is not None:
        x = call(operator.sub, high, call(F.relu, call(operator.sub, high, x)))
    return x


def _splits(node: Any) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in SPLITS
