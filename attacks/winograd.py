"""3x3 convolutions in a quarter of the multiplications, for the many passes of an attack on a CPU.

Winograd's F(4, 3) (Lavin & Gray 2016): tiles of 4 pixels of a line are made from 6 products of sums of the tile's 6
inputs and of the kernel's 3 weights, where the definition takes 12. Both are sums in both directions, so that a 3x3
convolution of C to K channels is 36 products of matrices [tiles, C] @ [C, K]. What it costs besides, the kernel's sums,
is paid once, and an attack passes through the same weights twice a step.

The sums of the pixels are products of matrices, too: the whole line of pixels with the matrix of all its tiles, so that
padding and the tiles' overlap are in the matrix and nothing is copied. The gradient in the input goes the same way
backwards, with the same kernels' sums.

Results differ from the library's by rounding, up to 1e-5 of their largest value (the library's: 3e-7). That is nothing
to the steps of an attack, and no reason to trust it: bounds and verdicts never come here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attacks.dense_product import LEAST_WORK, product
from attacks.input_gradient import Form

# Where there is a gain was measured: scripts/bench/RESULTS.md. With fewer channels or more pixels the sums take too
# much of the time, with smaller matrices, or many pixels of a tile beside the image, the products.
LEAST_CHANNELS, MOST_PIXELS_PER_CHANNEL = 128, 1
LEAST_FILLED = 0.75

# Up to so many pixels one product with the matrix of the whole image is faster than one each way.
MOST_PIXELS_AT_ONCE = 16

TILE, KERNEL = 4, 3
PRODUCTS = TILE + KERNEL - 1

# Rows: products. Columns: the inputs of a tile, the weights of a kernel, the pixels of a tile. At the points 0, 1, -1,
# 2, -2 and infinity; the second factors are divided by what the interpolation would divide by.
OF_INPUTS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
OF_WEIGHTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OF_OUTPUTS = ((1, 0, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (1, 2, 4, 8), (1, -2, 4, -8), (0, 0, 0, 1))


def gains(weight: Tensor, form: Form, shape: Sequence[int]) -> bool:
    """Whether `Winograd` can take the place of a convolution of [B, C, H, W] on a CPU, and is faster for it."""
    batch, _, *size = shape
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or tuple(weight.shape[2:]) != (KERNEL, KERNEL):
        return False
    if form != ((1, 1), (1, 1), (1, 1), 1):
        return False
    channels, pixels, tiles = min(weight.shape[:2]), math.prod(size), math.prod(-(-s // TILE) for s in size)
    return (
        channels >= LEAST_CHANNELS
        and pixels <= MOST_PIXELS_PER_CHANNEL * channels
        and batch * tiles * math.prod(weight.shape[:2]) >= LEAST_WORK
        and pixels >= LEAST_FILLED * tiles * TILE**2
    )


@dataclass(frozen=True)
class Winograd:
    """A 3x3 convolution with constant weights, stride 1 and padding 1 on both sides.

    Args:
        kernels: sums of the weights, 6 times [6, K, C]: one tensor would be so large with many channels that its
            memory comes new from the system every time.
        bias: [K], or None.
    """

    kernels: tuple[Tensor, ...]
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Winograd:
        """The convolution with these weights [K, C, 3, 3]."""
        grown, channels = weight.shape[:2]
        sums = weight.new_tensor(OF_WEIGHTS)
        both = torch.einsum("pi,qj->qpij", sums, sums).flatten(2)
        flat = weight.reshape(grown * channels, -1).T
        return cls(tuple((across @ flat).view(PRODUCTS, grown, channels) for across in both), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, H, W]; differentiable in x, once."""
        out: Tensor = _Convolution.apply(x, *self.kernels)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *kernels: Tensor) -> Tensor:
        ctx.kernels = kernels
        turned = [kernel.transpose(1, 2) for kernel in kernels]
        return _transformed(x, turned, _of_lines(x, OF_INPUTS, -1), _of_lines(x, OF_OUTPUTS, 0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        given, wanted = _of_lines(grad, OF_OUTPUTS, 0), _of_lines(grad, OF_INPUTS, -1)
        return _transformed(grad, ctx.kernels, given, wanted), *[None] * PRODUCTS


Lines = tuple[Tensor, Tensor]
"""For a column and a row of pixels: what each pixel has to do with each product, [products * tiles, pixels]."""


def _of_lines(x: Tensor, sums: tuple[tuple[float, ...], ...], first: int) -> Lines:
    rows, columns = (_of_line(size, sums, first).to(x) for size in x.shape[2:])
    return rows, columns


@functools.cache
def _of_line(size: int, sums: tuple[tuple[float, ...], ...], first: int) -> Tensor:
    """[products * tiles, pixels] of a line; a tile's sums begin at its own pixel number `first`."""
    tiles = -(-size // TILE)
    line = torch.zeros(PRODUCTS, tiles, size)
    for tile in range(tiles):
        for place in range(len(sums[0])):
            pixel = TILE * tile + first + place
            if 0 <= pixel < size:
                line[:, tile, pixel] = torch.tensor([row[place] for row in sums], dtype=line.dtype)
    return line.flatten(0, 1)


def _transformed(x: Tensor, kernels: Sequence[Tensor], given: Lines, wanted: Lines) -> Tensor:
    """[B, C, H, W] -> [B, K, H, W]: sums of the pixels, products with the kernels [6, C, K], and the products' sums."""
    products = []
    for sums, across in zip(_sums(x, *given), kernels, strict=True):
        found = sums.new_empty(PRODUCTS, sums.shape[1], across.shape[2])
        for down in range(PRODUCTS):
            found[down] = product(sums[down], across[down])
        products.append(found)
    return _pixels(products, len(x), *wanted)


def _sums(x: Tensor, rows: Tensor, columns: Tensor) -> Sequence[Tensor]:
    """[B, C, H, W] -> for each of the products across [products down, tiles down * tiles across * B, C]."""
    _, channels, height, width = x.shape
    if height * width <= MOST_PIXELS_AT_ONCE:
        sums = product(_at_once(rows, columns), x.reshape(-1, height * width).T)
        return sums.view(PRODUCTS, PRODUCTS, -1, channels).unbind()
    lines = product(columns, x.reshape(-1, width).T).view(PRODUCTS, -1, height)  # [across, tiles B C, H]
    return [product(rows, line.T).view(PRODUCTS, -1, channels) for line in lines]


def _pixels(products: Sequence[Tensor], batch: int, rows: Tensor, columns: Tensor) -> Tensor:
    """For each of the products across [products down, tiles down * tiles across * B, K] -> [B, K, H, W]."""
    channels, height, width = products[0].shape[-1], rows.shape[1], columns.shape[1]
    if height * width <= MOST_PIXELS_AT_ONCE:
        both = _at_once(rows, columns)
        found = product(torch.stack(list(products)).view(len(both), -1).T, both)
    else:
        lines = torch.stack([product(across.view(len(rows), -1).T, rows) for across in products])
        found = product(lines.view(len(columns), -1).T, columns)
    return found.view(batch, channels, height, width)


def _at_once(rows: Tensor, columns: Tensor) -> Tensor:
    """What each pixel has to do with each product: [across * down * tiles down * tiles across, H * W]."""
    down, across = (lines.view(PRODUCTS, -1, lines.shape[1]) for lines in (rows, columns))
    return torch.einsum("ptw,qsh->pqsthw", across, down).reshape(len(rows) * len(columns), -1)
