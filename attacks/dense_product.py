"""Dense float32 products on a CPU by oneDNN, torch's library for convolutions, instead of its BLAS.

torch multiplies matrices by MKL, which leaves the wide registers unused on processors of other makers than its own: an
AMD processor that convolves at 200 GFLOP/s multiplies at 110, and by oneDNN at 230. See scripts/bench/RESULTS.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# With fewer multiplications, or few rows of the weight where the left matrix lies in columns, the way through oneDNN
# costs more than it saves. A shape that is new to the process costs another 0.3 ms, once.
LEAST_WORK = 2**22
LEAST_ROWS_FOR_COLUMNS = 64


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` of matrices `[B, n]`, `[m, n]` and `[m]`, by the faster library; differentiable.

    What oneDNN does not take or gain from is `F.linear` itself: other shapes, numbers and devices, autocast, and a
    process whose user has switched oneDNN off.
    """
    if not _gains(x, weight, bias):
        return F.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        out: Tensor = _Dense.apply(x, weight, bias)
        return out
    return _by_onednn(x, weight, bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of matrices; see `dense`."""
    return dense(left, right.T)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _by_onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.turned = weight.stride(0) == 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        d_weight = None
        if for_weight:
            # In the weight's own layout: another one would be copied, number by number, on the way to the parameter.
            d_weight = product(x.T, grad).T if ctx.turned else product(grad.T, x)
        return product(grad, weight) if for_x else None, d_weight, grad.sum(0) if for_bias else None


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _gains(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dim() == weight.dim() == 2
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and len(x) * weight.numel() >= LEAST_WORK
        and (x.stride(1) == 1 or len(weight) >= LEAST_ROWS_FOR_COLUMNS)
        and all(_suits(tensor) for tensor in (x, weight, bias) if tensor is not None)
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not _transformed()
        and _measured()
    )


def _suits(tensor: Tensor) -> bool:
    """Whether it is a plain float32 tensor on the CPU, in which the numbers of one axis lie side by side."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    (near, count), *others = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    return near == 1 and all(far >= count for far, _ in others)


def _transformed() -> bool:
    """Whether functions are being transformed: forward derivatives of oneDNN's product would be zeros without a word,
    and maps over examples are no faster by it."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def _measured() -> bool:
    """Whether the processor is of the kind that was measured, x86 with AVX2 or AVX-512, and torch has oneDNN for it."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
