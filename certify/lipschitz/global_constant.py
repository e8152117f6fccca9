"""Global Lipschitz constants: products of operator norms along the graph, valid for every input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify.bounds.jacobian import DUAL
from certify.graph import Graph, Node, Snapshot
from certify.lipschitz.operator_norm import NORMS, Norm, operator_norm_bound
from certify.lipschitz.problem import in_float64
from certify.op import Op
from certify.ops.affine import Linear
from certify.ops.merge import Add, Concat


def global_lipschitz(
    model: nn.Module | Graph | Snapshot, x: Tensor, norm: Norm = "l2", spec: Tensor | None = None
) -> Tensor:
    """Certified upper bounds `[R]` of the Lipschitz constants of the logits, or of rows `[R, K]`, over all inputs.

    Norms of layers are multiplied, branches added up (concatenated ones by their norm). The last dense layer counts row
    by row, with the norm that answers to `norm`, not by its operator norm.

    Args:
        x: an example batch, for its shape.
        norm: in which distances of inputs are measured.

    Raises:
        UnsupportedOp: an op without a Lipschitz constant; never a guess.
    """
    if norm not in NORMS:
        raise ValueError(f"no Lipschitz constant for distances in {norm!r}; known norms: {', '.join(NORMS)}")
    snapshot = in_float64(model, x)
    *front, last = snapshot.nodes
    rows = torch.eye(last.shape[0], dtype=torch.float64, device=x.device) if spec is None else spec.double()
    constants = [torch.ones((), dtype=torch.float64, device=x.device)]
    for node in front[1:]:
        constants.append(_constant(node, constants, norm))
    if isinstance(last.op, Linear):
        # Rounded up: a sum of n products is off by no more than n units in the last place of its terms' sizes.
        weights = torch.linalg.vector_norm(rows @ last.op.weight, DUAL[norm], dim=1)
        return weights * (1 + 1e-12) * constants[last.inputs[0]]
    return torch.linalg.vector_norm(rows, DUAL[norm], dim=1) * _constant(last, constants, norm)


def _constant(node: Node, constants: list[Tensor], norm: Norm) -> Tensor:
    inputs = [constants[i] for i in node.inputs]
    if isinstance(node.op, Add):
        return inputs[0] + inputs[1]
    if isinstance(node.op, Concat):
        order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[norm]
        return torch.linalg.vector_norm(torch.stack(inputs), order)
    return inputs[0] * _norm(node.op, norm)


def _norm(op: Op, norm: Norm) -> Tensor | float:
    return operator_norm_bound(op, norm) if op.is_linear else op.lipschitz(norm)
