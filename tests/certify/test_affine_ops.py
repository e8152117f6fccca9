"""What every affine op says about itself, against the dense matrix that its `forward` has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify.op import Adjoint, AffineOp, NonNegativeOp, UnsupportedOp
from certify.ops.merge import Piece
from certify.ops.reshape import Identity, Reshape
from certify.tracing import capture
from tests.certify.networks import INPUT, KINDS, VARIANTS, network


def leaves(kind: type) -> set[type]:
    below = kind.__subclasses__()
    return {kind} if not below else set().union(*(leaves(k) for k in below))


def affine_ops(name: str) -> list[tuple[AffineOp, tuple[int, ...]]]:
    """The affine ops of a block of the test networks, each with the shape of its input."""
    graph = capture(network([(KINDS | VARIANTS)[name]], 0).double(), torch.zeros(1, *INPUT, dtype=torch.float64))
    nodes = graph.snapshot().without_gradient().nodes
    # Behind normalisation and stem, before the dense head and what flattens for it.
    inside = [node for node in nodes[STEM:-2] if isinstance(node.op, AffineOp)]
    return [(node.op, nodes[node.inputs[0]].shape) for node in inside]  # type: ignore[misc]


STEM = 4
OTHERS = [(Piece(1, 1, 2, 4), (4, 3)), (Reshape((4, 3), (12,)), (4, 3)), (Identity(), (4, 3))]
OPS = {name: found for name in KINDS | VARIANTS if (found := affine_ops(name))} | {"others": OTHERS}


def dense(op: AffineOp, shape: tuple[int, ...]) -> Tensor:
    """The matrix `[out, in]` of the op's linear part, from its values alone."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    return (op.forward(units) - op.forward(torch.zeros_like(units[:1]))).flatten(1).T


def test_every_affine_op_is_among_them():
    own = {kind for kind in leaves(AffineOp) if kind.__module__.startswith("certify.ops")}
    assert own == {type(op) for found in OPS.values() for op, _ in found}


@pytest.mark.parametrize("name", OPS)
def test_linear_and_absolute_parts_are_those_of_the_matrix(name: str):
    for op, shape in OPS[name]:
        check_parts(op, shape)


def check_parts(op: AffineOp, shape: tuple[int, ...]) -> None:
    W = dense(op, shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    radius = x.abs()
    assert torch.allclose(op.linear_part().forward(x).flatten(1), x.flatten(1) @ W.T, atol=1e-12)
    spread = op.absolute(radius).flatten(1)
    assert torch.allclose(spread, op.absolute_part().forward(radius).flatten(1), atol=1e-12)
    # Powers of a kernel of absolute values are no less than the absolute values of the power.
    assert bool((spread >= radius.flatten(1) @ W.abs().T - 1e-12).all())
    g = torch.randn(3, *op.forward(x).shape[1:], generator=generator, dtype=torch.float64)
    (adjoint,) = op.gradient([None])
    assert isinstance(adjoint, Adjoint)
    assert torch.allclose(adjoint.forward(g).flatten(1), g.flatten(1) @ W, atol=1e-12)
    assert bool((adjoint.absolute(g.abs()).flatten(1) >= g.abs().flatten(1) @ W.abs() - 1e-12).all())
    if isinstance(op, NonNegativeOp):
        assert bool((W >= 0).all()) and bool((op.forward(torch.zeros_like(x)) == 0).all())


def test_an_op_that_does_not_say_has_no_bounds():
    class Turned(AffineOp):
        def forward(self, *inputs: Tensor) -> Tensor:
            return -inputs[0]

    with pytest.raises(UnsupportedOp, match="Turned has no rule for the bounds of its derivative: no linear_part"):
        Turned().gradient([None])
    with pytest.raises(UnsupportedOp, match="Turned has no rule for intervals: no absolute_part"):
        Turned().absolute(torch.ones(1, 2))
