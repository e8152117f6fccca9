"""Averages: AvgPool2d, adaptive average pool, mean over axes. Linear with non-negative weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.op import RULES, Call, NonNegativeOp, Op


@dataclass(frozen=True)
class Average(NonNegativeOp):
    """A linear map with non-negative weights, given as a function; its transpose comes from autograd."""

    function: Callable[[Tensor], Tensor]
    in_shape: tuple[int, ...]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def transpose(self, A: Tensor) -> Tensor:
        rows, batch = A.shape[:2]
        with torch.enable_grad():
            point = A.new_zeros(rows * batch, *self.in_shape, requires_grad=True)
            out = self.function(point)
            (pulled,) = torch.autograd.grad(out, point, A.reshape(out.shape), create_graph=A.requires_grad)
        return pulled.view(rows, batch, *self.in_shape)


@RULES.module(nn.AvgPool2d)
def _avg_pool(layer: nn.AvgPool2d, call: Call) -> Op:
    _check_divisor(layer.divisor_override, call)
    return Average(layer.forward, call.args[0].shape)


@RULES.module(nn.AdaptiveAvgPool2d)
def _adaptive(layer: nn.AdaptiveAvgPool2d, call: Call) -> Op:
    return Average(layer.forward, call.args[0].shape)


def _pool_function(target: Callable[..., Tensor]) -> Callable[[Call], Op]:
    def build(call: Call) -> Op:
        args, kwargs = call.args[1:], dict[str, Any](call.kwargs)
        if target is F.avg_pool2d:
            _check_divisor(call.argument(6, "divisor_override"), call)
        return Average(lambda x: target(x, *args, **kwargs), call.args[0].shape)

    return build


def _check_divisor(divisor: int | None, call: Call) -> None:
    if divisor is not None and divisor < 0:
        raise call.refuse(f"an average with divisor_override={divisor} has negative weights; negate its output instead")


for _target in (F.avg_pool2d, F.adaptive_avg_pool2d):
    RULES.function(_target)(_pool_function(_target))


@RULES.function(torch.mean, "mean")
def _mean(call: Call) -> Op:
    dim, keepdim = call.argument(1, "dim"), call.argument(2, "keepdim", False)
    if dim is None:
        raise call.refuse("a mean over all axes includes the batch; name the axes")
    axes = [d % (len(call.args[0].shape) + 1) for d in ([dim] if isinstance(dim, int) else dim)]
    if 0 in axes:
        raise call.refuse("a mean over the batch axis is not supported")
    return Average(lambda x: x.mean(axes, keepdim=bool(keepdim)), call.args[0].shape)
