"""Convolutions while a model is attacked on a CPU, when only the gradient in their input is wanted."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.input_gradient import Form, input_gradient, way


class ConstantConvolution(torch.autograd.Function):
    """Convolution with constant weights, whose gradient in the input goes a faster way than the library's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *form: Any) -> Tensor:
        """The convolution, as torch computes it; `form` is a `Form` for which there is a `way`."""
        return F.conv2d(x, weight, bias, *form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the weight and the sizes that the gradient needs, not the input."""
        x, ctx.weight, _, *form = inputs
        ctx.form, ctx.size, ctx.dtype = tuple(form), x.shape[2:], x.dtype
        ctx.how = way(ctx.weight, ctx.form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in the input alone."""
        # Under autocast the incoming gradient may be bfloat16; the input it belongs to is not.
        weight = ctx.weight.to(grads[0].dtype)
        found = input_gradient(grads[0], weight, ctx.size, ctx.form, ctx.how).to(ctx.dtype)
        return found, *[None] * 6


def wants_input_gradient_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a convolution of `x` is part of an attack on a CPU."""
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.dim() == 4
        and x.device.type == "cpu"
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )


@contextmanager
def faster_input_gradients(model: nn.Module) -> Iterator[None]:
    """Let the model's convolutions use `ConstantConvolution` where it applies and gains."""
    convs = [module for module in model.modules() if type(module) is nn.Conv2d and _gains(module)]
    for conv in convs:
        conv.forward = functools.partial(_forward, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def computes_as_its_class(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, or the one of `faster_input_gradients`, which gives the same."""
    forward = vars(module).get("forward")
    return forward is None or (isinstance(forward, functools.partial) and forward.func is _forward)


def _gains(conv: nn.Conv2d) -> bool:
    if "forward" in vars(conv):  # somebody else's
        return False
    return (
        conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and way(conv.weight, _form(conv)) is not None
    )


def _form(conv: nn.Conv2d) -> Form:
    return conv.stride, conv.padding, conv.dilation, conv.groups  # type: ignore[return-value]


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not wants_input_gradient_alone(x, conv.weight, conv.bias):
        return conv._conv_forward(x, conv.weight, conv.bias)
    result: Tensor = ConstantConvolution.apply(x, conv.weight, conv.bias, *_form(conv))
    return result
