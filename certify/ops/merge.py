"""Ops with several inputs: sum, difference, concatenation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.interval import Interval
from certify.op import RULES, AnyBox, Call, NonNegativeOp, Op, Traced
from certify.ops.affine import Scale, add_constant, subtract_constant
from certify.ops.reshape import Identity


@dataclass(frozen=True)
class Add(Op):
    """`v + sign * w` for two values of the same shape."""

    sign: int = 1

    is_linear = True

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.add(inputs[0], inputs[1], alpha=self.sign)

    def interval(self, *inputs: Interval) -> Interval:
        left, right = inputs
        return Interval(self.forward(left.center, right.center), left.radius + right.radius)

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        return [A, A if self.sign == 1 else -A], A.new_zeros(A.shape[:2])

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        return [Identity(), Identity() if self.sign == 1 else Scale(-one, zero)]


@dataclass(frozen=True)
class Concat(Op):
    """Concatenation along axis `dim` (batch axis included in the count), of pieces of the given sizes."""

    dim: int
    sizes: tuple[int, ...]

    is_linear = True

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)

    def interval(self, *inputs: Interval) -> Interval:
        return Interval(self.forward(*(i.center for i in inputs)), self.forward(*(i.radius for i in inputs)))

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        return list(A.split(self.sizes, self.dim + 1)), A.new_zeros(A.shape[:2])

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        starts = (sum(self.sizes[:i]) for i in range(len(self.sizes)))
        return [Piece(self.dim, start, size, sum(self.sizes)) for start, size in zip(starts, self.sizes, strict=True)]


@dataclass(frozen=True)
class Piece(NonNegativeOp):
    """`size` entries from `start` on along axis `dim` (batch axis included in the count), of `total` ones."""

    dim: int
    start: int
    size: int
    total: int

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].narrow(self.dim, self.start, self.size)

    def transpose(self, A: Tensor) -> Tensor:
        shape = [*A.shape[: self.dim + 1], self.total, *A.shape[self.dim + 2 :]]
        out = A.new_zeros(shape)
        out.narrow(self.dim + 1, self.start, self.size).copy_(A)
        return out


def _sum(call: Call, sign: int) -> Op:
    left, right = call.args[0], call.argument(1, "other")
    if isinstance(left, Traced) and isinstance(right, Traced):
        if left.shape != right.shape:
            raise call.refuse(f"sum of values of shapes {left.shape} and {right.shape} (broadcasting is not supported)")
        if call.kwargs.get("alpha", 1) != 1:
            raise call.refuse("the keyword alpha of a sum is not supported")
        return Add(sign)
    return (add_constant if sign == 1 else subtract_constant)(call)


@RULES.function(operator.add, torch.add, "add", "add_", operator.iadd)
def _add(call: Call) -> Op:
    return _sum(call, 1)


@RULES.function(operator.sub, torch.sub, "sub", "sub_", operator.isub)
def _sub(call: Call) -> Op:
    return _sum(call, -1)


@RULES.function(torch.cat, torch.concat, torch.concatenate)
def _cat(call: Call) -> Op:
    pieces = call.argument(0, "tensors")
    if not all(isinstance(piece, Traced) for piece in pieces):
        raise call.refuse("concatenation with a constant is not supported")
    rank = len(pieces[0].shape) + 1
    dim = call.argument(1, "dim", 0) % rank
    if dim == 0:
        raise call.refuse("concatenation along the batch axis is not supported")
    return Concat(dim, tuple(piece.shape[dim - 1] for piece in pieces))
