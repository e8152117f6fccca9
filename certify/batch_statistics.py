"""BatchNorm in training mode that also returns its batch statistics, differentiable.

The bounds of a training step normalise with the statistics of the clean batch, and the gradient of the bound loss
flows through them (Shi et al. 2021; `torch.nn.functional.batch_norm` computes the same output but hides them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify.ops.batch_norm import Statistics


def batch_norm(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> tuple[Tensor, Statistics]:
    """Training-mode output of `layer` on `x` `[B, C, ...]`, with the batch's mean and biased variance `[C]`.

    Running statistics are updated as the layer would. Raises ValueError for a batch of one number per channel.
    """
    count = x.numel() // x.shape[1]
    if count < 2:
        raise ValueError(f"BatchNorm needs more than one value per channel in training, got input {tuple(x.shape)}")
    out, mean, var = _BatchNorm.apply(x, layer.weight, layer.bias, layer.eps)
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.add_(1)
            momentum = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.detach(), momentum)
            layer.running_var.lerp_(var.detach() * (count / (count - 1)), momentum)
    return out, Statistics(mean, var)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        var = inverse_std.pow(-2).sub_(eps).clamp_(min=0)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.eps = eps
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_mean, grad_var = grads
        x, weight, mean, inverse_std = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], weight is not None, weight is not None]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_out, x, weight, None, None, mean, inverse_std, True, ctx.eps, wanted
        )
        if grad_x is not None:
            # mean = sum x / n and var = sum (x - mean)^2 / n add grad_mean / n + 2 grad_var (x - mean) / n.
            count = x.numel() // x.shape[1]
            shape = (1, -1, *[1] * (x.dim() - 2))
            slope = grad_var * (2 / count)
            offset = grad_mean / count - slope * mean
            grad_x.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
        return grad_x, grad_weight, grad_bias, None
