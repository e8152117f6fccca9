"""BatchNorm in training mode that also returns its batch statistics, differentiable.

The bounds of a training step normalise with the statistics of the clean batch, and the gradient of the bound loss
flows through them (Shi et al. 2021; `torch.nn.functional.batch_norm` computes the same output but hides them).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from certify.all_reduce import summed
from certify.ops.batch_norm import Statistics


def batch_norm(
    layer: nn.modules.batchnorm._BatchNorm,
    x: Tensor,
    constant: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Statistics]:
    """Training-mode output of `layer` on `x` `[B, C, ...]`, with the batch's mean and biased variance `[C]`.

    Running statistics are updated as the layer would. Raises ValueError for a batch of one number per channel.

    Args:
        constant: gradients flow to x alone, not to the layer's weight and bias.
        group: processes that have a part of the batch each; the statistics are those of the whole.
    """
    count: int | Tensor = x.numel() // x.shape[1]
    if group is None and count < 2:
        raise ValueError(f"BatchNorm needs more than one value per channel in training, got input {tuple(x.shape)}")
    affine = (layer.weight, layer.bias)
    weight, bias = (None if part is None else part.detach() for part in affine) if constant else affine
    if group is None:
        out, mean, var = _BatchNorm.apply(x, weight, bias, layer.eps)
    else:
        mean, var, count = _over(group, x)
        scale = torch.rsqrt(var + layer.eps) if weight is None else torch.rsqrt(var + layer.eps) * weight
        out = (x - _per_channel(mean, x)) * _per_channel(scale, x)
        out = out if bias is None else out + _per_channel(bias, x)
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.add_(1)
            momentum = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.detach(), momentum)
            layer.running_var.lerp_(var.detach() * (count / (count - 1)), momentum)
    return out, Statistics(mean, var)


def _over(group: dist.ProcessGroup, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, numbers per channel) of the batch whose parts `[b, C, ...]` the processes have.

    In two passes: the difference of the mean square and the squared mean would cancel.
    """
    others = [axis for axis in range(x.dim()) if axis != 1]
    sums = summed(torch.cat([x.sum(others), x.new_full((1,), x.numel() // x.shape[1])]), group)
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    return mean, summed((x - _per_channel(mean, x)).square().sum(others), group) / count, count


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if weight is None and x.dtype in (torch.bfloat16, torch.float16):
            # Autocast's reduced precision is for the activations: with float32 parameters the statistics keep theirs.
            weight, bias = x.new_ones(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float32)
        if x.device.type == "cpu" and x.dim() > 2 and x.is_contiguous():
            mean, var = _mean_and_variance(x)
            out = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
            inverse_std = torch.rsqrt(var + eps)
        else:
            out, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
            var = inverse_std.pow(-2).sub_(eps).clamp_(min=0)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.set_materialize_grads(False)  # most passes use no statistics: two passes over the activations less
        ctx.eps = eps
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_mean, grad_var = grads
        x, weight, mean, inverse_std = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(x)
        wanted = list(ctx.needs_input_grad[:3])
        # Detached: where this pass is differentiated itself (GradAlign), the rule goes through x all the way.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_out, x, weight, None, None, mean.detach(), inverse_std, True, ctx.eps, wanted
        )
        if grad_x is not None and not (grad_mean is None and grad_var is None):
            # mean = sum x / n and var = sum (x - mean)^2 / n add grad_mean / n + 2 grad_var (x - mean) / n.
            count = x.numel() // x.shape[1]
            shape = (1, -1, *[1] * (x.dim() - 2))
            nothing = torch.zeros_like(mean)
            slope = (nothing if grad_var is None else grad_var) * (2 / count)
            offset = (nothing if grad_mean is None else grad_mean) / count - slope * mean
            grad_x.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
        return grad_x, grad_weight, grad_bias, None


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a contiguous `[B, C, ...]`.

    In two passes, with vector instructions: PyTorch's own kernel for this layout is scalar and takes four times as
    long, a thirtieth of a ResNet's step.
    """
    mean = x.flatten(2).mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).mean(0)
    centred = (x - mean.view(-1, *[1] * (x.dim() - 2))).flatten(2)
    return mean, torch.linalg.vector_norm(centred, dim=2).square_().sum(0) / (len(x) * centred.shape[2])
