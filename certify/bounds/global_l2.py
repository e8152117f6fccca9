"""Bounds from one number: the l2 Lipschitz constant of everything before the last dense layer.

Logits W h(x) + b with h K-Lipschitz in l2 change a row c . logits by at most K ||c W||_2 eps over an l2 ball of radius
eps: the last layer is taken exactly, row by row (GloRo: Leino et al. 2021). K is put together from certified operator
norms (`certify.lipschitz.operator_norm`), never from power iteration, which errs downwards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attacks.threat import euclidean_norm
from certify.graph import Node, Snapshot
from certify.lipschitz.operator_norm import operator_norm_bound
from certify.op import AffineOp, Op, UnsupportedOp
from certify.ops.affine import Conv2d, Linear
from certify.ops.circular_conv import CircularConv2d
from certify.ops.exponential import Exponential
from certify.ops.merge import Add, Concat
from certify.ops.relu import ReLU
from certify.precision import ALLOWANCES, exact_arithmetic, rounding_at_points
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import capture
from certify.verdict import evaluation


@torch.no_grad()
def global_l2(snapshot: Snapshot, region: Region) -> tuple[Tensor, Tensor]:
    """Lower bounds of all outputs `[B, R]` of a network that ends in its specification, and their scale of rounding.

    Not differentiable.

    Raises:
        ValueError: a region that is no l2 ball.
        UnsupportedOp: an op without a rule, named by its node; no constant is ever guessed.
    """
    if region.ball is None or region.ball.norm != "l2":
        norm = "linf" if region.ball is None else region.ball.norm
        raise ValueError(f"global_l2 bounds l2 balls, got an {norm} ball; use an l2 ball, or ibp, crown or alpha_crown")
    rows = _rows(snapshot, region.x)
    deviation = region.ball.eps_of(region.x).flatten().to(rows.value).unsqueeze(1) * rows.constant
    return rows.value - deviation, rows.size + deviation


@torch.no_grad()
def global_l2_radius(model: nn.Module, x: Tensor, *, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """(l2 radius within which the prediction provably stays, prediction) of each example, `[B]` and `[B]`.

    min over i != j of (y_j - y_i) / (K ||w_j - w_i||_2) for the predicted class j, less what rounding can do to it; 0
    where the margin does not exceed that, infinite where no class can ever draw level. The pixel range is not used.

    Args:
        x: `[B, *shape]`, of the model's precision.
        batch_size: examples at a time.

    Raises:
        CaptureError, UnsupportedOp: a model that `global_l2` cannot bound.
    """
    with evaluation(model), exact_arithmetic():
        snapshot = capture(model, x[:1]).snapshot().without_gradient()
        parts = [_radius(snapshot, part) for part in x.split(batch_size)]
    radius, prediction = zip(*parts, strict=True)
    return torch.cat(radius), torch.cat(prediction)


def _radius(snapshot: Snapshot, x: Tensor) -> tuple[Tensor, Tensor]:
    logits = snapshot(x)
    prediction = logits.argmax(1)
    network = snapshot.with_spec(margin_spec(prediction, logits.shape[1], x.dtype))
    rows = _rows(network, x)
    of_scale, of_size = ALLOWANCES[x.dtype]
    lost = torch.maximum(of_scale * rows.size, of_size * rounding_at_points(network, x))
    margin = (rows.value - lost).clamp(min=0)
    # A share of the radius stands for the rounding of constant and quotient. 0 / 0 is a tie: no radius.
    radius = torch.where(margin > 0, margin / rows.constant, 0.0).amin(1) * (1 - of_scale)
    return radius, prediction


class _Rows(NamedTuple):
    """Rows of a specification at points: value, sum of the sizes of its terms, Lipschitz constant; each `[B, R]`."""

    value: Tensor
    size: Tensor
    constant: Tensor


def _rows(snapshot: Snapshot, x: Tensor) -> _Rows:
    *front, last = snapshot.nodes
    (place,) = last.inputs
    assert isinstance(last.op, Linear)
    features = Snapshot(tuple(front[: place + 1])).evaluate([x])[-1]
    weight, bias = last.op.weight, last.op.bias
    size = Linear(weight.abs(), None if bias is None else bias.abs()).forward(features.abs())
    constant = lipschitz_constants(front[: place + 1])[-1].to(x) * euclidean_norm(weight, (-1,))
    return _Rows(last.op.forward(features), size, constant)


@torch.no_grad()
def lipschitz_constants(nodes: Sequence[Node]) -> list[Tensor]:
    """l2 Lipschitz constant, as an upper bound, of every node's value as a function of the input; float64 scalars.

    Branches that are added have their constants added, but for x - 2 W^T relu(W x + b), see `_potential_step`.

    Raises:
        UnsupportedOp: an op without a rule, named by its node.
    """
    constants = [torch.ones((), dtype=torch.float64)]
    for node in nodes[1:]:
        inputs = [constants[i] for i in node.inputs]
        inner = _potential_step(nodes, node)
        try:
            if inner is not None:
                # With D the slopes of the activation, in [0, 1]: W^T D W has eigenvalues in [0, s], s = ||W||^2.
                constants.append(inputs[0] * (2 * _norm(inner).square() - 1).clamp(min=1))
            else:
                constants.append(_constant(node.op, inputs))
        except UnsupportedOp as error:
            raise UnsupportedOp(f"global_l2, node {node.name!r}: {error}") from None
    return constants


def _constant(op: Op, inputs: list[Tensor]) -> Tensor:
    if isinstance(op, Add):
        return inputs[0] + inputs[1]
    if isinstance(op, Concat):
        return torch.stack(inputs).norm()
    return inputs[0] * (_norm(op) if isinstance(op, AffineOp) else op.lipschitz("l2"))


def _potential_step(nodes: Sequence[Node], node: Node) -> Linear | Conv2d | None:
    """The inner layer W of a node x - 2 W^T relu(W x + b), None for any other node.

    The outer layer must be the transposed inner one to the last bit: then the form decides, not who made it.
    """
    if not (isinstance(node.op, Add) and node.op.sign == -1):
        return None
    outer = nodes[node.inputs[1]]
    activation = nodes[outer.inputs[0]] if outer.inputs else outer
    inner = nodes[activation.inputs[0]] if activation.inputs else activation
    if not isinstance(activation.op, ReLU) or inner.inputs != (node.inputs[0],):
        return None
    first, second = inner.op, outer.op
    if isinstance(first, Linear) and isinstance(second, Linear):
        return first if _equal(second.weight, 2 * first.weight.T) else None
    if isinstance(first, Conv2d) and isinstance(second, Conv2d):
        adjoint = first.weight.flip(2, 3).transpose(0, 1)
        plain = (first.stride, second.stride, first.dilation, second.dilation) == ((1, 1),) * 4
        ungrouped = first.groups == second.groups == 1
        # The transposed convolution pads by what the kernel reaches beyond the padding of the first.
        reach = tuple(k - 1 - p for k, p in zip(first.weight.shape[2:], first.padding, strict=True))
        same = plain and ungrouped and second.padding == reach
        return first if same and _equal(second.weight, 2 * adjoint) else None
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


_NORMS: dict[bytes, float] = {}
"""Norms of weights met before, by a digest of the weights: a verifier is called batch by batch with the same ones."""

_MOST_NORMS = 4096


def _norm(op: AffineOp) -> Tensor:
    """Upper bound of the operator norm of the linear part of `op`, float64 on the CPU."""
    if not isinstance(op, Linear | Conv2d | CircularConv2d | Exponential):
        return operator_norm_bound(op).cpu()
    key = _digest(op)
    if key not in _NORMS:
        if len(_NORMS) >= _MOST_NORMS:
            _NORMS.clear()
        _NORMS[key] = float(_computed_norm(op))
    return torch.tensor(_NORMS[key], dtype=torch.float64)


def _computed_norm(op: AffineOp) -> Tensor:
    if isinstance(op, CircularConv2d):
        symbols = replace(op, weight=op.weight.double()).symbols()
        # A complex matrix has the norm of its real form. The transform loses far less than is added.
        top, bottom = torch.cat([symbols.real, -symbols.imag], 2), torch.cat([symbols.imag, symbols.real], 2)
        return operator_norm_bound(torch.cat([top, bottom], 1)).max() * (1 + 1e-10)
    if isinstance(op, Exponential):
        size = operator_norm_bound(op.generator)
        if op.is_skew:
            # What the series leaves out of an orthogonal matrix, for eigenvalues on the imaginary axis up to `size`.
            bound = 1 + size ** (op.terms + 1) / math.factorial(op.terms + 1)
        else:
            bound = torch.stack([size**k / math.factorial(k) for k in range(op.terms + 1)]).sum()
        return bound * (1 + 1e-12)
    return operator_norm_bound(op)


def _digest(op: AffineOp) -> bytes:
    """A fingerprint of everything that the norm of a layer with weights depends on."""
    found = hashlib.blake2b(type(op).__name__.encode(), digest_size=32)
    for name, value in sorted(vars(op).items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            found.update(value.detach().contiguous().cpu().numpy().tobytes())
        else:
            found.update(f"{name} {value!r}".encode())
    return found.digest()
