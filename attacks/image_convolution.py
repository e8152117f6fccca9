"""Convolutions of few channels while a model is attacked, when only the gradient in their input is wanted."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_IMAGE_CHANNELS = 4

# Channels that a convolution of a model makes out of each of the image's: with fewer the library is as fast, at least
# with the channels side by side in memory.
LEAST_GROWTH = 4

# A convolution with strides and at most so many input channels gains by interleaving, unless the zeros that fill up its
# kernel multiply the work by more than this: kernel 5 with stride 2 gains at 36/25, kernel 3 loses at 16/9.
MOST_INTERLEAVED_CHANNELS = 16
MOST_FILLING = 1.5


class ImageConvolution(torch.autograd.Function):
    """Convolution with constant weights, in one group.

    With as few channels as an image has, the gradient in it is a product with the kernel matrix and a fold, 2 to 8
    times faster on a CPU than the library's transposed convolution, which is built for many channels. With strides it
    is one convolution whose results are interleaved, 1.2 to 3 times faster.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        """The convolution, as torch computes it."""
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the weight and the sizes that the gradient needs, not the image."""
        x, ctx.weight, _, ctx.stride, ctx.padding, ctx.dilation = inputs
        ctx.size, ctx.dtype = x.shape[2:], x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in the image alone."""
        # Under autocast the incoming gradient may be bfloat16; the pixels it belongs to are not.
        weight = ctx.weight.to(grads[0].dtype)
        if _interleaves(weight, ctx.stride, ctx.dilation):
            found = _interleaved(grads[0], weight, ctx.size, ctx.stride, ctx.padding).to(ctx.dtype)
        else:
            found = _folded(grads[0], weight, ctx)
        return found, None, None, None, None, None


def _interleaves(weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    filling = math.prod(
        math.ceil(size / step) * step / size for size, step in zip(weight.shape[2:], stride, strict=True)
    )
    few = weight.shape[1] <= MOST_INTERLEAVED_CHANNELS
    return few and min(stride) > 1 and max(dilation) == 1 and filling <= MOST_FILLING


def _folded(gradient: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    """Gradient of a convolution in its input by a product with the kernel matrix, added up in the pixels.

    One addition per element of the kernel is up to twice as fast as the library's fold.
    """
    channels, *kernel = weight.shape[1:]
    down, across = ((count - 1) * step + 1 for count, step in zip(gradient.shape[2:], ctx.stride, strict=True))
    parts = (weight.permute(2, 3, 1, 0).flatten(0, 2) @ gradient.flatten(2)).to(ctx.dtype)
    parts = parts.unflatten(2, gradient.shape[2:]).unflatten(1, (*kernel, channels))
    (height, width), (above, left) = ctx.size, ctx.padding
    found = parts.new_zeros((len(gradient), channels, height + 2 * above, width + 2 * left))
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            top, first = row * ctx.dilation[0], column * ctx.dilation[1]
            rows, columns = slice(top, top + down, ctx.stride[0]), slice(first, first + across, ctx.stride[1])
            found[:, :, rows, columns] += parts[:, row, column]
    return found[:, :, above : above + height, left : left + width]


def _interleaved(
    gradient: Tensor, weight: Tensor, size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Gradient [B, C, *size] of a convolution in its input.

    Pixel i of a line of the padded input meets the weights i mod s, i mod s + s, ... and no others. So the pixels of
    one phase i mod s are a convolution of the gradient without strides, and those of all phases are its channels.
    """
    taps = [math.ceil(kernel / step) for kernel, step in zip(weight.shape[2:], stride, strict=True)]
    rows, columns = (tap * step - kernel for tap, step, kernel in zip(taps, stride, weight.shape[2:], strict=True))
    # [O, C, taps, phases, taps, phases] -> [phases * phases * C, O, taps, taps]
    split = F.pad(weight, (0, columns, 0, rows)).unflatten(3, (taps[1], stride[1])).unflatten(2, (taps[0], stride[0]))
    kernels = split.flip(2, 4).permute(3, 5, 1, 0, 2, 4).flatten(0, 2)
    phases = F.conv2d(gradient, kernels, padding=(taps[0] - 1, taps[1] - 1)).unflatten(1, (*stride, weight.shape[1]))
    # The layout of the incoming gradient is that of the model's other activations.
    if gradient.shape[1] > 1 and gradient.stride(1) == 1:
        found = gradient.new_zeros((len(gradient), *size, weight.shape[1])).movedim(3, 1)
    else:
        found = gradient.new_zeros((len(gradient), weight.shape[1], *size))
    for row in range(stride[0]):
        for column in range(stride[1]):
            top, down = divmod(row + padding[0], stride[0])
            left, across = divmod(column + padding[1], stride[1])
            part, place = phases[:, down, across, :, top:, left:], found[:, :, row :: stride[0], column :: stride[1]]
            # Pixels at the end that no window reaches keep their zeros.
            height, width = min(part.shape[2], place.shape[2]), min(part.shape[3], place.shape[3])
            place[:, :, :height, :width] = part[:, :, :height, :width]
    return found


def wants_image_gradient_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a convolution, of one group, is part of an attack on a CPU, and x has the channels of an image."""
    return _wants_input_gradient_alone(x, weight, bias) and x.shape[1] <= MOST_IMAGE_CHANNELS


def _wants_input_gradient_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.dim() == 4
        and x.device.type == "cpu"
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )


@contextmanager
def faster_image_gradients(model: nn.Module) -> Iterator[None]:
    """Let the model's convolutions use `ImageConvolution` where it applies and gains."""
    convs = [module for module in model.modules() if type(module) is nn.Conv2d and _gains(module)]
    for conv in convs:
        conv.forward = functools.partial(_forward, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def _gains(conv: nn.Conv2d) -> bool:
    if "forward" in vars(conv):  # somebody else's
        return False
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    folds = conv.in_channels <= MOST_IMAGE_CHANNELS and conv.out_channels >= LEAST_GROWTH * conv.in_channels
    return folds or _interleaves(conv.weight, conv.stride, conv.dilation)


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    weight, bias = conv.weight, conv.bias
    if not _wants_input_gradient_alone(x, weight, bias):
        return conv._conv_forward(x, weight, bias)
    result: Tensor = ImageConvolution.apply(x, weight, bias, conv.stride, conv.padding, conv.dilation)
    return result
