"""Swish written out, v * sigmoid(v), read as the one function that it is.

Bounds of the product of two values that know nothing of each other would be loose; SiLU's are not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

PRODUCTS = (operator.mul, torch.mul, "mul", "mul_", operator.imul)
SIGMOIDS = (torch.sigmoid, F.sigmoid, "sigmoid", torch.sigmoid_, "sigmoid_")


def join_swish(graph: torch.fx.Graph, layer: Callable[[str], nn.Module]) -> None:
    """Replace every product of a value and its sigmoid by a call of silu, in place.

    Args:
        layer: the module that a node names.
    """
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in PRODUCTS or len(node.args) != 2:
            continue
        for value, gate in (node.args, node.args[::-1]):
            if isinstance(gate, torch.fx.Node) and _is_sigmoid(gate, layer) and gate.args == (value,):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(F.silu, (value,)))
                graph.erase_node(node)
                if not gate.users:
                    graph.erase_node(gate)
                break


def _is_sigmoid(node: torch.fx.Node, layer: Callable[[str], nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(layer(str(node.target)), nn.Sigmoid)
    return node.op in ("call_function", "call_method") and node.target in SIGMOIDS
