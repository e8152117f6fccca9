"""Affine layers: dense, convolutional, and elementwise scale and shift (normalisation, unfolded BatchNorm)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.constant_convolution import ConstantConvolution, wants_input_gradient_alone
from attacks.dense_product import dense, product
from attacks.input_gradient import Form, input_gradient, way
from certify.affine_intervals import ConvInterval, LinearInterval
from certify.interval import BallImage, Interval
from certify.op import RULES, AffineOp, Call, NonNegativeOp, Op, Traced


@dataclass(frozen=True)
class Linear(AffineOp):
    """`W v + b` on the last axis of a `[B, n]` input; `weight` is `[m, n]`, or `[B, m, n]` with rows per example."""

    weight: Tensor
    bias: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if self.weight.dim() == 2:
            return dense(x, self.weight, self.bias)
        out = torch.einsum("brn,bn->br", self.weight, x)
        return out if self.bias is None else out + self.bias

    def each(self, rows: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return super().each(rows)
        out = torch.einsum("bmn,rbn->rbm", self.weight, rows)
        return out if self.bias is None else out + self.bias

    def linear_part(self) -> AffineOp:
        return replace(self, bias=None)

    def absolute_part(self) -> AffineOp:
        return replace(self, weight=self.weight.abs(), bias=None)

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        if self.weight.dim() == box.center.dim() == 2 and torch.is_grad_enabled() and self.weight.requires_grad:
            out = Interval(*LinearInterval.apply(box.center, box.radius, self.weight, self.bias))
        else:
            out = Interval(self.forward(box.center), self.absolute(box.radius))
        if box.ball is None:
            return out
        return box.ball.meet(out, self.forward(box.ball.point), _half_axes(self, box.ball))

    def transpose(self, A: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return product(A.flatten(0, 1), self.weight).unflatten(0, A.shape[:2])
        return torch.einsum("rbm,bmn->rbn", A, self.weight)

    def constant(self, A: Tensor) -> Tensor:
        if self.bias is None:
            return A.new_zeros(A.shape[:2])
        return (A * self.bias).flatten(2).sum(-1)

    def select(self, index: Tensor) -> Linear:
        """The layer for members of the batch, with repetitions; itself where all examples share their rows."""
        if self.weight.dim() == 2:
            return self
        shared = self.bias is None or self.bias.dim() == 1
        return Linear(self.weight[index], self.bias if shared else self.bias[index])  # type: ignore[index]

    def rows(self, spec: Tensor) -> Linear:
        """The layer followed by `spec` `[B, R, m]`, as one layer with rows per example."""
        weight = spec @ self.weight
        bias = None if self.bias is None else (spec @ self.bias.unsqueeze(-1)).squeeze(-1)
        return Linear(weight, bias)


@dataclass(frozen=True)
class Conv2d(AffineOp):
    """2-d convolution with zero padding; `in_shape` is (C, H, W) of one example."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_shape: tuple[int, ...]

    @property
    def form(self) -> Form:
        """What `F.conv2d` takes behind weight and bias."""
        return self.stride, self.padding, self.dilation, self.groups

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if wants_input_gradient_alone(x, self.weight, self.bias) and way(self.weight, self.form) is not None:
            return ConstantConvolution.apply(x, self.weight, self.bias, *self.form)
        return F.conv2d(x, self.weight, self.bias, *self.form)

    def linear_part(self) -> AffineOp:
        return replace(self, bias=None)

    def absolute_part(self) -> AffineOp:
        return replace(self, weight=self.weight.abs(), bias=None)

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        if torch.is_grad_enabled() and self.weight.requires_grad:
            out = Interval(*ConvInterval.apply(box.center, box.radius, self.weight, self.bias, *self.form))
        else:
            out = Interval(self.forward(box.center), self.absolute(box.radius))
        if box.ball is None:
            return out
        return box.ball.meet(out, self.forward(box.ball.point), _half_axes(self, box.ball))

    def transpose(self, A: Tensor) -> Tensor:
        rows, batch, _, *out_size = A.shape
        flat = A.reshape(rows * batch, *A.shape[2:])
        differentiated = torch.is_grad_enabled() and (A.requires_grad or self.weight.requires_grad)
        how = None if differentiated or A.device.type != "cpu" else way(self.weight, self.form)
        if how is not None:
            size = self.in_shape[1], self.in_shape[2]
            return input_gradient(flat, self.weight, size, self.form, how).reshape(rows, batch, *self.in_shape)
        kernel = self.weight.shape[2:]
        missing = [
            size - ((out - 1) * stride - 2 * pad + dilation * (k - 1) + 1)
            for size, out, stride, pad, dilation, k in zip(
                self.in_shape[1:], out_size, self.stride, self.padding, self.dilation, kernel, strict=True
            )
        ]
        flat = F.conv_transpose2d(
            flat, self.weight, None, self.stride, self.padding, tuple(missing), self.groups, self.dilation
        )
        return flat.view(rows, batch, *self.in_shape)

    def constant(self, A: Tensor) -> Tensor:
        if self.bias is None:
            return A.new_zeros(A.shape[:2])
        return A.flatten(3).sum(-1) @ self.bias


@dataclass(frozen=True)
class Scale(AffineOp):
    """`scale * v + shift` elementwise; both broadcastable to `[B, *shape]`."""

    scale: Tensor
    shift: Tensor

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.scale.dim() == 0:  # a Python number, kept on the CPU and in float64 whatever the input is
            return inputs[0] * self.scale + self.shift
        return torch.addcmul(self.shift, inputs[0], self.scale)

    def absolute(self, radius: Tensor) -> Tensor:
        return radius * self.scale.abs()

    def linear_part(self) -> AffineOp:
        return Scale(self.scale, torch.zeros_like(self.shift))

    def absolute_part(self) -> AffineOp:
        return Scale(self.scale.abs(), torch.zeros_like(self.shift))

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        ball = box.ball and BallImage(self.forward(box.ball.point), box.ball.scale * self.scale.abs(), box.ball.eps)
        return Interval(self.forward(box.center), self.absolute(box.radius), ball)

    def transpose(self, A: Tensor) -> Tensor:
        return A * self.scale

    def constant(self, A: Tensor) -> Tensor:
        return (A * self.shift).flatten(2).sum(-1)


def _half_axes(op: Linear | Conv2d, ball: BallImage) -> Tensor:
    """Greatest move of each output over the ball's image: the root of the sum of (weight * half-axis)^2."""
    # Squares and their products may vanish below the smallest number; what each may lose is added.
    tiny = torch.finfo(op.weight.dtype).tiny
    axes = ball.scale.expand_as(ball.point).square() + tiny
    squared = replace(op, weight=op.weight.square() + tiny, bias=None).forward(axes)
    return (squared + tiny * op.weight[0].numel()).sqrt()


@RULES.module(nn.Linear)
def _linear(layer: nn.Linear, call: Call) -> Op:
    return Linear(layer.weight, layer.bias)


@RULES.function(F.linear)
def _linear_call(call: Call) -> Op:
    return Linear(call.argument(1, "weight"), call.argument(2, "bias"))


def conv2d(
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    in_shape: tuple[int, ...],
) -> Conv2d:
    """Conv2d op from the arguments that `torch.nn.functional.conv2d` takes."""
    spread = pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            raise ValueError("padding='same' with an even kernel pads unevenly; use an explicit nn.ZeroPad2d")
        padding = (total[0] // 2, total[1] // 2)
    return Conv2d(weight, bias, pair(stride), pair(padding), spread, groups, in_shape)


@RULES.module(nn.Conv2d)
def _conv_layer(layer: nn.Conv2d, call: Call) -> Op:
    if layer.padding_mode != "zeros":
        raise call.refuse(f"Conv2d with padding_mode={layer.padding_mode!r} has no bound rule; use zeros")
    shape = call.args[0].shape
    return conv2d(layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups, shape)  # type: ignore[arg-type]


@RULES.function(F.conv2d)
def _conv_call(call: Call) -> Op:
    source = call.args[0]
    return conv2d(
        call.argument(1, "weight"),
        call.argument(2, "bias"),
        call.argument(3, "stride", 1),
        call.argument(4, "padding", 0),
        call.argument(5, "dilation", 1),
        call.argument(6, "groups", 1),
        source.shape,
    )


@RULES.module(nn.ZeroPad2d)
def _zero_pad(layer: nn.ZeroPad2d, call: Call) -> Op:
    return Pad(tuple(layer.padding))


@RULES.function(F.pad)
def _pad_call(call: Call) -> Op:
    padding = tuple(call.argument(1, "pad"))
    value, mode = call.argument(3, "value", None), call.argument(2, "mode", "constant")
    if mode != "constant" or value or len(padding) not in (2, 4) or min(padding) < 0:
        raise call.refuse(f"padding {padding} with mode={mode!r}, value={value} has no bound rule; use zeros")
    return Pad(padding + (0, 0) * (2 - len(padding) // 2))


@dataclass(frozen=True)
class Pad(NonNegativeOp):
    """Zero padding of the last two axes: (left, right, top, bottom), none negative."""

    padding: tuple[int, ...]

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.pad(inputs[0], self.padding)

    def transpose(self, A: Tensor) -> Tensor:
        return F.pad(A, tuple(-p for p in self.padding))


@RULES.module("torchvision.transforms.transforms.Normalize")
def _torchvision_normalize(layer: Any, call: Call) -> Op:
    mean, std = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (layer.mean, layer.std))
    return Scale(1 / std, -mean / std)


def _affine(combine: Callable[[Tensor, bool], tuple[Tensor | float, Tensor | float]]) -> Callable[[Call], Op]:
    """Rule for an arithmetic function of one traced value and one constant.

    Args:
        combine: (constant, whether the traced value stands on the left) -> (scale, shift), exact.
    """

    def build(call: Call) -> Op:
        left, right = call.args[:2]
        if call.kwargs:
            raise call.refuse(f"keyword {', '.join(call.kwargs)} of an arithmetic function is not supported")
        traced = left if isinstance(left, Traced) else right
        constant = _constant(right if isinstance(left, Traced) else left)
        if constant.dim() > len(traced.shape) + 1 or (constant.dim() == len(traced.shape) + 1 and len(constant) != 1):
            raise call.refuse("a constant with a batch axis cannot be bounded")
        if call.out_shape != traced.shape:
            raise call.refuse("a constant that broadcasts the value to a larger shape is not supported")
        scale, shift = combine(constant, isinstance(left, Traced))
        filled = torch.zeros_like(constant)
        return Scale(filled + scale, filled + shift)

    return build


def _constant(value: Any) -> Tensor:
    """A number or a tensor as a tensor; numbers stay in float64, which does not widen what they are combined with."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _division(call: Call) -> Op:
    if not isinstance(call.args[0], Traced):
        raise call.refuse("division of a constant by a value is not affine")
    return _divide(call)


def _product(call: Call) -> Op:
    left, right = call.args[:2]
    if isinstance(left, Traced) and isinstance(right, Traced):
        raise call.refuse("a product of two values is not supported")
    return _multiply(call)


_multiply = _affine(lambda constant, _: (constant, 0.0))
_divide = _affine(lambda constant, _: (1 / constant, 0.0))
RULES.function(operator.mul, torch.mul, "mul", "mul_", operator.imul)(_product)
RULES.function(operator.truediv, torch.div, "div", "div_", torch.true_divide, operator.itruediv)(_division)

add_constant = _affine(lambda constant, _: (1.0, constant))
subtract_constant = _affine(lambda constant, left: (1.0, -constant) if left else (-1.0, constant))


@RULES.function(operator.neg, torch.neg, "neg")
def _negate(call: Call) -> Op:
    return Scale(_constant(-1.0), _constant(0.0))


def pair(value: Any) -> tuple[int, int]:
    """(height, width) from a number or a sequence."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
