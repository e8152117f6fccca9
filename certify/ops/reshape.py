"""Ops that only move numbers or do nothing in evaluation: reshape, flatten, permute, identity, dropout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from certify.interval import Interval
from certify.op import RULES, Call, NonNegativeOp, Op


@dataclass(frozen=True)
class Reshape(NonNegativeOp):
    """Another shape for each example, order kept."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(-1, *self.out_shape)

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        ball = box.ball and replace(
            box.ball,
            point=self.forward(box.ball.point),
            scale=self.forward(box.ball.scale.expand_as(box.ball.point)),
        )
        return Interval(self.forward(box.center), self.forward(box.radius), ball)

    def transpose(self, A: Tensor) -> Tensor:
        return A.reshape(*A.shape[:2], *self.in_shape)


@dataclass(frozen=True)
class Permute(NonNegativeOp):
    """Axes of each example in another order; `order` includes the batch axis 0 in front."""

    order: tuple[int, ...]

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].permute(self.order)

    def transpose(self, A: Tensor) -> Tensor:
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return A.permute(0, *(axis + 1 for axis in back))


@dataclass(frozen=True)
class Identity(NonNegativeOp):
    """Nothing happens."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def interval(self, *inputs: Interval) -> Interval:
        return inputs[0]

    def transpose(self, A: Tensor) -> Tensor:
        return A


RESHAPES = ("view", "reshape", "flatten", "squeeze", "unsqueeze")


@RULES.function(*RESHAPES, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze)
def _reshape(call: Call) -> Op:
    # The new shape was observed at capture with the batch axis checked, so the call's own arguments, which may have
    # been computed from x.size(0), are not needed.
    return Reshape(call.args[0].shape, call.out_shape)


@RULES.function("permute", torch.permute)
def _permute(call: Call) -> Op:
    order = call.args[1:]
    order = order[0] if len(order) == 1 and not isinstance(order[0], int) else order
    return _checked_permute(call, tuple(axis % (len(call.args[0].shape) + 1) for axis in order))


@RULES.function("transpose", torch.transpose)
def _transpose(call: Call) -> Op:
    rank = len(call.args[0].shape) + 1
    order = list(range(rank))
    first, second = call.argument(1, "dim0") % rank, call.argument(2, "dim1") % rank
    order[first], order[second] = order[second], order[first]
    return _checked_permute(call, tuple(order))


def _checked_permute(call: Call, order: tuple[int, ...]) -> Op:
    if order[0] != 0:
        raise call.refuse("moving the batch axis is not supported")
    return Permute(order)


@RULES.module(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def _identity(layer: nn.Module, call: Call) -> Op:
    return Identity()


@RULES.function(torch.nn.functional.dropout, torch.nn.functional.dropout2d, "contiguous", "clone", "float")
def _identity_call(call: Call) -> Op:
    return Identity()


@RULES.module(nn.Flatten, nn.Unflatten)
def _flatten_layer(layer: nn.Module, call: Call) -> Op:
    return _reshape(call)
