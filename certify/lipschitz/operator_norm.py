"""Operator norms of linear layers as upper bounds that hold, and power iteration for the lower side.

A certificate divides by a Lipschitz constant, so an underestimate of a norm makes it wrong. Power iteration converges
from below and proves nothing; everything here but `power_iteration` errs upwards, rounding included: norms are computed
in float64 and enlarged by what float64 can lose (`_enlarged`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.graph import cast_tensors
from certify.op import AffineOp, Op, UnsupportedOp
from certify.ops.affine import Conv2d, Linear, Pad, Scale, conv2d
from certify.ops.average_pool import Average
from certify.ops.reshape import Identity, Permute, Reshape
from certify.ops.select import Select

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


def operator_norm_bound(
    layer: Tensor | nn.Linear | nn.Conv2d | Op,
    norm: Norm = "l2",
    *,
    in_shape: tuple[int, ...] | None = None,
    gram_iterations: int | None = None,
) -> Tensor:
    """Certified upper bound of max ||W v|| / ||v|| for the linear part W of a layer, bias left out.

    l1 and linf are the greatest column and row sum of |W|, exact, padding and stride included. l2 of a dense layer is
    exact. l2 of a convolution is the maximum over the frequencies of a circular convolution on a ring so large that
    nothing wraps around, of which the zero-padded one is a part: above the exact value by a percent or so for kernels
    much smaller than the image. A stride s first moves s x s pixels into channels. With circular padding it is exact.

    Args:
        layer: a weight `[m, n]` (or `[..., m, n]`, one norm each), a layer, or an affine op of a Snapshot.
        in_shape: (C, H, W) of one example; needed for an nn.Conv2d, which does not know its input's size.
        gram_iterations: for l2, steps of Gram iteration (Delattre et al. 2023), cheaper to differentiate and, on a GPU,
            to compute; by how much it is above decreases quadratically. Singular values (LAPACK) where None.

    Returns:
        The bound in float64, a scalar (or `[...]`), differentiable with respect to the weight.

    Raises:
        UnsupportedOp: an op without a rule; never a guess.
        ValueError: an unknown norm, a convolution of unknown input size.
    """
    if norm not in NORMS:
        raise ValueError(f"no operator norm {norm!r}; known: {', '.join(NORMS)}")
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "circular":
        return _circular_norm(layer, norm, _needed(in_shape), gram_iterations)
    op = _as_op(layer, in_shape)
    if isinstance(op, Identity | Reshape | Permute | Pad):
        return torch.ones((), dtype=torch.float64)
    if isinstance(op, Select):
        # Rows of the identity: the Gram matrix is diagonal and counts how often each number is picked.
        most = float(op.index.bincount().max())
        return _enlarged(torch.tensor({"l2": most**0.5, "l1": most, "linf": 1.0}[norm], dtype=torch.float64))
    if isinstance(op, Scale):
        return _enlarged(op.scale.double().abs().max())
    if norm != "l2":
        return _sum_norm(op, norm)
    if isinstance(op, Linear):
        return _spectral(op.weight.double(), gram_iterations)
    if isinstance(op, Conv2d):
        return _greatest(_ring(op), gram_iterations)
    # For weights that are not negative ||W||_2^2 <= ||W||_1 ||W||_inf, and windows that do not overlap reach it.
    return (_sum_norm(op, "l1") * _sum_norm(op, "linf")).sqrt()


class PowerIteration(NamedTuple):
    """An attained ratio ||W v|| / ||v||, never above the norm but for rounding, and the unit vector `v` `[1, *in]`."""

    value: Tensor
    v: Tensor


@torch.no_grad()
def power_iteration(op: AffineOp, start: Tensor, iterations: int = 10) -> PowerIteration:
    """Lower bound of the l2 operator norm by power iteration on W^T W; for warm starts pass the last vector on.

    Args:
        start: `[1, *in]`, not zero; a random vector at first.
    """
    shift = op.forward(torch.zeros_like(start))
    v = start / start.norm()
    for _ in range(iterations):
        pulled = op.transpose((op.forward(v) - shift).unsqueeze(0)).squeeze(0)
        size = pulled.norm()
        if not bool(size > 0):
            break
        v = pulled / size
    return PowerIteration((op.forward(v) - shift).norm(), v)


def _as_op(layer: Tensor | nn.Module | Op, in_shape: tuple[int, ...] | None) -> AffineOp:
    if isinstance(layer, Tensor):
        return Linear(layer)
    if isinstance(layer, nn.Linear):
        return Linear(layer.weight)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        size = _needed(in_shape)
        return conv2d(layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups, size)  # type: ignore[arg-type]
    if isinstance(layer, Linear | Conv2d | Scale | Average | Identity | Reshape | Permute | Pad | Select):
        return layer
    raise UnsupportedOp(
        f"no operator norm for {type(layer).__name__}; known: a weight [m, n], nn.Linear, nn.Conv2d with zero or "
        "circular padding, and the affine ops of a Snapshot with one input"
    )


def _needed(in_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if in_shape is None or len(in_shape) != 3:
        raise ValueError(
            f"the norm of a convolution depends on its input's size: give in_shape=(C, H, W), got {in_shape}"
        )
    return in_shape


def _enlarged(value: Tensor, terms: int = 1) -> Tensor:
    """`value` plus what float64 may have lost of it: 1e-12 of it, and one unit for each of `terms` added up."""
    return value * (1 + 1e-12 + 2 * torch.finfo(torch.float64).eps * terms)


def _sum_norm(op: AffineOp, norm: Norm) -> Tensor:
    """Greatest row (linf) or column (l1) sum of |W|."""
    if isinstance(op, Linear):
        return _enlarged(op.weight.double().abs().sum(-1 if norm == "linf" else -2).amax(-1), sum(op.weight.shape[-2:]))
    wide: Any = cast_tensors(op, torch.float64)
    if isinstance(wide, Conv2d):
        wide = replace(wide, weight=wide.weight.abs(), bias=None)
        terms = wide.weight[0].numel() + wide.weight[:, 0].numel()
    else:
        terms = int(torch.Size(wide.in_shape).numel())
    ones = torch.ones(1, *wide.in_shape, dtype=torch.float64, device=_device(op))
    rows = wide.forward(ones)
    return _enlarged((rows if norm == "linf" else wide.transpose(torch.ones_like(rows).unsqueeze(0))).max(), terms)


def _device(op: Op) -> torch.device | None:
    return next((value.device for value in vars(op).values() if isinstance(value, Tensor)), None)


def _spectral(matrices: Tensor, gram_iterations: int | None) -> Tensor:
    """Upper bound of the greatest singular value of each matrix `[..., m, n]`, real or complex, in double precision.

    The smaller Gram matrix has the squared singular values as its eigenvalues. A rounding error of its entries, at most
    n units of |W|^T |W|, is at most n times the rank units of its greatest eigenvalue.
    """
    terms = matrices.shape[-1] * matrices.shape[-2]
    gram = matrices @ matrices.mH if matrices.shape[-2] < matrices.shape[-1] else matrices.mH @ matrices
    if gram_iterations is None:
        return _enlarged(torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt(), terms)
    return _enlarged(_gram_iteration(gram, gram_iterations), terms)


def _gram_iteration(gram: Tensor, iterations: int) -> Tensor:
    """Upper bound of the root of the greatest eigenvalue of Hermitian matrices G by G <- G^2, rescaled each time.

    After k steps, the first of which made G from W: lambda(G_k)^(2^-k) is the singular value, and any norm of G_k is
    at least lambda(G_k). Of Frobenius' and the greatest row sum the smaller counts: the latter is exact for an
    orthogonal W, where the former is above by the root of its rank. Source: Delattre et al. 2023, section 3.
    """
    logarithm = torch.zeros(gram.shape[:-2], dtype=torch.float64, device=gram.device)
    for step in range(1, iterations + 1):
        # The factor cancels: it needs no gradient. Zero matrices stay zero.
        size = gram.detach().abs().amax((-2, -1)).clamp(min=torch.finfo(torch.float64).tiny)
        gram = gram / size[..., None, None]
        logarithm = logarithm + size.log() / 2**step
        if step < iterations:
            gram = gram @ gram
    frobenius = gram.abs().square().sum((-2, -1)).sqrt()
    bound = torch.minimum(frobenius, gram.abs().sum(-1).amax(-1))
    zero = bound == 0
    root = torch.where(zero, 1.0, bound) ** (1 / 2**iterations)
    return torch.where(zero, 0.0, root * logarithm.exp())


class _Ring(NamedTuple):
    """A circular convolution of stride 1: kernel `[out, in, kh, kw]` per group, on a ring of the given size."""

    kernels: tuple[Tensor, ...]
    size: tuple[int, int]


def _ring(conv: Conv2d) -> _Ring:
    """A circular convolution of which the zero-padded one is a part: on a ring that holds image and kernel together."""
    sides = []
    kernels = conv.weight.double()
    for axis in (0, 1):
        kernels = _unstrided(kernels, axis, conv.stride[axis], conv.padding[axis], conv.dilation[axis])
        sides.append(-(-conv.in_shape[1 + axis] // conv.stride[axis]) + kernels.shape[-2 + axis] - 1)
    return _Ring(_grouped(kernels, conv.groups), (sides[0], sides[1]))


def _unstrided(kernel: Tensor, axis: int, stride: int, padding: int, dilation: int) -> Tensor:
    """The same kernel on pixels that are gathered `stride` at a time into channels, along one image axis.

    `[out, in * s, ...]`: tap a reads pixel s * i + a * d - p, member r of block i + b, where s * b + r = a * d - p.
    """
    kernel = kernel.movedim(2 + axis, -1)
    if dilation > 1:
        spread = kernel.new_zeros(*kernel.shape, dilation)
        spread = torch.cat([kernel.unsqueeze(-1), spread[..., 1:]], -1).flatten(-2)
        kernel = spread[..., : spread.shape[-1] - dilation + 1]
    before = -padding % stride
    after = -(before + kernel.shape[-1]) % stride
    kernel = F.pad(kernel, (before, after)).unflatten(-1, (-1, stride))  # [out, in, other axis, blocks, stride]
    return kernel.movedim(-1, 2).flatten(1, 2).movedim(-1, 2 + axis)


def _grouped(kernels: Tensor, groups: int) -> tuple[Tensor, ...]:
    return kernels.chunk(groups)


def _circular_norm(layer: nn.Conv2d, norm: Norm, in_shape: tuple[int, ...], gram_iterations: int | None) -> Tensor:
    size = in_shape[1:]
    kernel = layer.weight.double()
    padding = layer.padding if isinstance(layer.padding, tuple) else None
    for axis in (0, 1):
        reach = layer.dilation[axis] * (kernel.shape[2 + axis] - 1)
        pad = reach / 2 if padding is None else padding[axis]
        if pad != reach / 2 or size[axis] % layer.stride[axis] or reach >= size[axis]:
            raise UnsupportedOp(
                "a circular convolution needs a kernel smaller than the image, half of its reach as padding, and a "
                f"stride that divides the image; got {layer} on {in_shape}"
            )
    if norm != "l2":
        # Every output sees every tap once; every pixel is seen by each tap of its phase.
        summed = kernel.abs()
        if norm == "linf":
            return _enlarged(summed.sum((1, 2, 3)).max(), summed[0].numel())
        phases = _phases(layer, summed)
        return _enlarged(torch.stack([part.sum((0, 2, 3)).max() for part in phases]).max(), summed[:, 0].numel())
    sides = (size[0] // layer.stride[0], size[1] // layer.stride[1])
    return _greatest(_Ring(_phases(layer, kernel), sides), gram_iterations)


def _phases(layer: nn.Conv2d, kernel: Tensor) -> tuple[Tensor, ...]:
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.weight.shape[2 + axis] - 1)
        kernel = _unstrided(kernel, axis, layer.stride[axis], reach // 2, layer.dilation[axis])
    return _grouped(kernel, layer.groups)


def _greatest(ring: _Ring, gram_iterations: int | None) -> Tensor:
    """Greatest norm over groups and frequencies."""
    found = [
        _spectral(matrices, gram_iterations).max()
        for kernel in ring.kernels
        for matrices in _symbols(kernel, ring.size)
    ]
    return torch.stack(found).max()


def _symbols(kernel: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Fourier symbols of a real kernel `[out, in, kh, kw]`: per frequency along the height, `[W / 2 + 1, out, in]`.

    Of two conjugate frequencies one is enough. One row at a time: all of them at once are as large as the dense layer's
    blocks, 2.5 GB for 512 channels.
    """
    taps = torch.arange(kernel.shape[2], dtype=torch.float64, device=kernel.device)
    # A kernel that is wider than the ring wraps around: rfft would cut it.
    columns = -(-kernel.shape[3] // size[1]) * size[1] - kernel.shape[3]
    wrapped = F.pad(kernel, (0, columns)).unflatten(3, (-1, size[1])).sum(3)
    for row in range(size[0]):
        phase = torch.polar(torch.ones_like(taps), -2 * torch.pi * row * taps / size[0])
        line = torch.einsum("oihw,h->oiw", wrapped.to(phase.dtype), phase)
        # The kernel is real, so frequency (-row, -column) is the conjugate of (row, column).
        yield torch.fft.fft(line, dim=-1)[..., : size[1] // 2 + 1].permute(2, 0, 1)
