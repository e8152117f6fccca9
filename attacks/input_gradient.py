"""Gradient of a convolution in its input, where there is a way that is faster on a CPU than the library's.

The library is built for many channels. Which sizes gain was measured: scripts/bench/RESULTS.md.
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]

Form = tuple[Pair, Pair, Pair, int]
"""Stride, padding, dilation and groups of a convolution, as `F.conv2d` takes them."""

Way = Literal["fold", "interleave", "turn"]

MOST_IMAGE_CHANNELS = 4

# Channels that a convolution makes out of each of the image's: with fewer the library is as fast as the fold, at least
# with the channels side by side in memory.
LEAST_GROWTH = 4

# With strides, at most so many input channels gain (any number behind a 1x1 kernel), unless the zeros that fill up the
# kernel multiply the work by more than this: kernel 5 with stride 2 gains at 36/25, kernel 3 loses at 16/9.
MOST_INTERLEAVED_CHANNELS = 16
MOST_FILLING = 1.5

MOST_TURNED_CHANNELS, TURNED_KERNEL = 16, (4, 4)


def way(weight: Tensor, form: Form) -> Way | None:
    """How to be faster than the library on a CPU with the kernel `weight` `[C_out, C_in / groups, h, w]`, if at all."""
    stride, padding, dilation, groups = form
    if groups != 1:
        return None
    grown, channels, *kernel = weight.shape
    if min(stride) > 1 and max(dilation) == 1:
        filling = math.prod(t * p / k for t, p, k in zip(*_phases(weight, stride), kernel, strict=True))
        few = channels <= MOST_INTERLEAVED_CHANNELS or max(kernel) == 1
        if few and filling <= MOST_FILLING:
            return "interleave"
    if channels <= MOST_IMAGE_CHANNELS and grown >= LEAST_GROWTH * channels:
        return "fold"
    covered = all(p <= d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True))
    if stride == (1, 1) and channels <= MOST_TURNED_CHANNELS and tuple(kernel) == TURNED_KERNEL and covered:
        return "turn"
    return None


def input_gradient(grad: Tensor, weight: Tensor, size: Pair, form: Form, how: Way) -> Tensor:
    """Gradient `[B, C_in, *size]` in the input, from the one in the output `[B, C_out, ...]`; differentiable.

    Args:
        how: as `way` says.
    """
    if how == "fold":
        return _folded(grad, weight, size, form)
    return _interleaved(grad, weight, size, form) if how == "interleave" else _turned(grad, weight, form)


def _folded(grad: Tensor, weight: Tensor, size: Pair, form: Form) -> Tensor:
    """A product with the kernel matrix, added up in the pixels.

    One addition per element of the kernel is up to twice as fast as the library's fold.
    """
    stride, padding, dilation, _ = form
    channels, *kernel = weight.shape[1:]
    down, across = ((count - 1) * step + 1 for count, step in zip(grad.shape[2:], stride, strict=True))
    parts = weight.permute(2, 3, 1, 0).flatten(0, 2) @ grad.flatten(2)
    parts = parts.unflatten(2, grad.shape[2:]).unflatten(1, (*kernel, channels))
    (height, width), (above, left) = size, padding
    found = parts.new_zeros((len(grad), channels, height + 2 * above, width + 2 * left))
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            top, first = row * dilation[0], column * dilation[1]
            rows, columns = slice(top, top + down, stride[0]), slice(first, first + across, stride[1])
            found[:, :, rows, columns] += parts[:, row, column]
    return found[:, :, above : above + height, left : left + width]


def _phases(weight: Tensor, stride: Pair) -> tuple[Pair, Pair]:
    """(taps, phases) along both axes: the pixels that meet weights have so many phases, and each so many weights."""
    taps, phases = zip(
        *((math.ceil(k / s), min(k, s)) for k, s in zip(weight.shape[2:], stride, strict=True)), strict=True
    )
    return taps, phases


def _interleaved(grad: Tensor, weight: Tensor, size: Pair, form: Form) -> Tensor:
    """One convolution without strides, and its results interleaved.

    Pixel i of a line of the padded input meets the weights i mod s, i mod s + s, ... and no others. So the pixels of
    one phase i mod s are a convolution of the gradient without strides, and those of all phases are its channels.
    """
    stride, padding, *_ = form
    taps, phases = _phases(weight, stride)
    rows, columns = (t * p - k for t, p, k in zip(taps, phases, weight.shape[2:], strict=True))
    # [O, C, taps, phases, taps, phases] -> [phases * phases * C, O, taps, taps]
    split = F.pad(weight, (0, columns, 0, rows)).unflatten(3, (taps[1], phases[1])).unflatten(2, (taps[0], phases[0]))
    kernels = split.flip(2, 4).permute(3, 5, 1, 0, 2, 4).flatten(0, 2)
    parts = F.conv2d(grad, kernels, padding=(taps[0] - 1, taps[1] - 1)).unflatten(1, (*phases, weight.shape[1]))
    # The layout of the incoming gradient is that of the model's other activations.
    if grad.shape[1] > 1 and grad.stride(1) == 1:
        found = grad.new_zeros((len(grad), *size, weight.shape[1])).movedim(3, 1)
    else:
        found = grad.new_zeros((len(grad), weight.shape[1], *size))
    for row in range(stride[0]):
        for column in range(stride[1]):
            (top, down), (left, across) = divmod(row + padding[0], stride[0]), divmod(column + padding[1], stride[1])
            if down >= phases[0] or across >= phases[1]:
                continue  # between two kernels
            part, place = parts[:, down, across, :, top:, left:], found[:, :, row :: stride[0], column :: stride[1]]
            # Pixels at the end that no window reaches keep their zeros.
            height, width = min(part.shape[2], place.shape[2]), min(part.shape[3], place.shape[3])
            place[:, :, :height, :width] = part[:, :, :height, :width]
    return found


def _turned(grad: Tensor, weight: Tensor, form: Form) -> Tensor:
    """Without strides: a convolution with the turned kernel."""
    _, padding, dilation, _ = form
    rest = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    return F.conv2d(grad, weight.flip(2, 3).transpose(0, 1), None, 1, rest, dilation)
