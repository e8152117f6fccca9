"""Op that picks numbers of each example by place: slices, indices, parts of a split, flips and rolls."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from certify.op import RULES, Call, NonNegativeOp, Op, Traced
from certify.rewrites import part_of


@dataclass(frozen=True)
class Select(NonNegativeOp):
    """`y[k] = x[index[k]]` for the numbers of each example in their order; a place may be picked more than once."""

    index: Tensor
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1)[:, self.index.to(inputs[0].device)].unflatten(1, self.out_shape)

    def transpose(self, A: Tensor) -> Tensor:
        out = A.new_zeros(*A.shape[:2], math.prod(self.in_shape))
        return out.index_add_(2, self.index.to(A.device), A.flatten(2)).unflatten(2, self.in_shape)


def _select(function: Callable[..., Tensor], call: Call) -> Op:
    """The op of a call that only moves numbers: where each one comes from is read off a batch of their places."""
    source, *rest = call.args
    if not isinstance(source, Traced) or any(isinstance(value, Traced) for value in rest):
        raise call.refuse("indices that depend on the input are not supported")
    count = math.prod(source.shape)
    places = torch.arange(2 * count).view(2, *source.shape)
    try:
        moved = function(places, *rest, **call.kwargs)
    except IndexError:  # there is no third example, and the other axes have been through a forward pass
        moved = places.new_empty(0)
    if tuple(moved.shape) != (2, *call.out_shape) or not torch.equal(moved[1], moved[0] + count):
        raise call.refuse("it moves numbers from one example to another; only the axes behind the batch can be indexed")
    return Select(moved[0].flatten(), source.shape, call.out_shape)


def _method(name: str) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


for _function in (operator.getitem, part_of, torch.narrow, torch.select, torch.flip, torch.roll, torch.index_select):
    RULES.function(_function)(partial(_select, _function))
for _name in ("narrow", "select", "flip", "roll", "index_select"):
    RULES.function(_name)(partial(_select, _method(_name)))
