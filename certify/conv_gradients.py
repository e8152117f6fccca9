"""Gradients of a convolution, by whichever way is faster on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Form = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation and groups."""

MOST_CHANNELS, KERNEL = 16, (4, 4)
"""The convolutions, of so many input channels at most, for which turning the kernel takes 0.8 times as long as the
library (scripts/bench/RESULTS.md); with other sizes it is no faster, or slower."""


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, form: Form, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in the input, the weight and the bias of `F.conv2d(x, weight, bias, *form)`, None where not `wanted`.

    Args:
        grad: gradient in the output, `[B, C_out, H_out, W_out]`.
    """
    stride, padding, dilation, groups = form
    for_x, for_weight, for_bias = wanted
    turned = for_x and gains_from_turning(weight, form)
    d_x = turned_convolution(grad, weight, form) if turned else None
    rest = (for_x and not turned, for_weight, for_bias)
    if not any(rest):
        return d_x, None, None
    by_library, d_weight, d_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, dilation, False, (0, 0), groups, rest
    )
    return d_x if turned else by_library, d_weight, d_bias


def gains_from_turning(weight: Tensor, form: Form) -> bool:
    """Whether `turned_convolution` applies and is faster than the library's own gradient in the input."""
    stride, padding, dilation, groups = form
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return (
        stride == (1, 1)
        and groups == 1
        and all(p <= r for p, r in zip(padding, reach, strict=True))
        and weight.device.type == "cpu"
        and weight.shape[1] <= MOST_CHANNELS
        and weight.shape[2:] == KERNEL
    )


def turned_convolution(grad: Tensor, weight: Tensor, form: Form) -> Tensor:
    """Gradient in the input of a convolution of stride 1 in one group, as a convolution with the turned kernel."""
    _, padding, dilation, _ = form
    rest = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    return F.conv2d(grad, weight.flip(2, 3).transpose(0, 1), None, 1, rest, dilation)
