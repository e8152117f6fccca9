"""Sums over the processes of a group, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def summed(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the processes' tensors of one shape, the same on all of them.

    The gradient is that of the sum of all processes' losses: every process has to go backward through it. It may be
    differentiated again.
    """
    result: Tensor = _Sum.apply(value, group)
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Each process's value enters the loss of every process.
        return summed(grads[0], ctx.group), None
