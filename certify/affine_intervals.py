"""Intervals through dense and convolutional layers, with gradients written by hand, for certified training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.dense_product import dense, product
from attacks.input_gradient import Form, input_gradient, way
from certify.blocks import blocks

WEIGHTS = 2**21
"""Weights of a dense layer whose magnitudes are made at a time, 8 MiB: memory that the process has at hand.

For tensors beyond 32 MiB the system clears new pages every time, which takes longer than what is computed into them.
"""


class LinearInterval(torch.autograd.Function):
    """Centre and radius through one dense layer, without ever having all of |W| in memory.

    A wide layer (32,768 x 512 in CNN7) holds most of a network's weights, so a saved |W| and separate gradient
    buffers for W and |W| would cost more memory than all activations.
    """

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(center, radius, weight)
        ctx.has_bias = bias is not None
        return dense(center, weight, bias), _through_magnitudes(radius, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_center, grad_radius = grads
        center, radius, weight = ctx.saved_tensors
        d_center = product(grad_center, weight) if ctx.needs_input_grad[0] else None
        d_radius = d_weight = None
        if ctx.needs_input_grad[1]:
            d_radius = torch.zeros_like(radius)
            for b in blocks(weight, 0, WEIGHTS):
                d_radius += product(grad_radius[:, b], weight[b].abs())
        if ctx.needs_input_grad[2]:
            d_weight = product(grad_center.T, center)
            for b in blocks(weight, 0, WEIGHTS):
                d_weight[b].addcmul_(product(grad_radius[:, b].T, radius), weight[b].sign())
        return d_center, d_radius, d_weight, grad_center.sum(0) if ctx.has_bias else None


def _through_magnitudes(radius: Tensor, weight: Tensor) -> Tensor:
    """`|W| r`, `[B, m]`."""
    parts = [dense(radius, weight[b].abs()) for b in blocks(weight, 0, WEIGHTS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class ConvInterval(torch.autograd.Function):
    """Centre and radius through one convolution; see `LinearInterval`."""

    @staticmethod
    def forward(
        ctx: Any, center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, *form: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(center, radius, weight)
        ctx.form = form
        return F.conv2d(center, weight, bias, *form), F.conv2d(radius, weight.abs(), None, *form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight = ctx.saved_tensors
        for_center, for_radius, for_weight, for_bias, *_ = ctx.needs_input_grad
        d_center, d_weight, d_bias = _conv_gradients(
            grads[0], center, weight, ctx.form, (for_center, for_weight, for_bias)
        )
        d_radius, d_magnitude, _ = _conv_gradients(
            grads[1], radius, weight.abs(), ctx.form, (for_radius, for_weight, False)
        )
        if for_weight:
            assert d_weight is not None and d_magnitude is not None
            d_weight = torch.addcmul(d_weight, d_magnitude, weight.sign())
        return d_center, d_radius, d_weight, d_bias, None, None, None, None


def _conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, form: Form, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution in its input, weight and bias, None where not `wanted`."""
    for_x, *others = wanted
    how = way(weight, form) if for_x and weight.device.type == "cpu" else None
    d_x = None if how is None else input_gradient(grad, weight, x.shape[2:], form, how)  # type: ignore[arg-type]
    rest = (for_x and how is None, *others)
    if not any(rest):
        return d_x, None, None
    stride, padding, dilation, groups = form
    by_library, d_weight, d_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, dilation, False, (0, 0), groups, rest
    )
    return by_library if how is None else d_x, d_weight, d_bias
