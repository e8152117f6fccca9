"""MaxPool2d with any kernel, stride, padding and dilation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.interval import Interval
from certify.op import RULES, AnyBox, Box, Call, Op
from certify.ops.affine import pair
from certify.ops.gate import product_lines, products


@dataclass(frozen=True)
class MaxPool2d(Op):
    """Maximum over windows; `in_shape` is (C, H, W) of one example."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool
    in_shape: tuple[int, ...]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._pool(inputs[0])[0]

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        return Interval.from_box(self.forward(box.lb), self.forward(box.ub))

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Lower line: the input of greatest lower bound. Upper: that input where it dominates, else a constant."""
        box = boxes[0]
        assert box is not None
        rows, batch, channels = A.shape[:3]
        _, chosen = self._pool(box.lb)  # [B, C, Ho, Wo], place in H * W
        ceiling, dominated = self._upper(box, chosen)
        positive, negative = A.clamp(min=0), A.clamp(max=0)
        through = positive + negative * dominated
        out = A.new_zeros(rows, batch, channels, self.in_shape[1] * self.in_shape[2])
        index = chosen.flatten(2).expand(rows, -1, -1, -1)
        out = out.scatter_add(3, index, through.flatten(3))
        constant = (negative * torch.where(dominated, 0.0, ceiling)).flatten(2).sum(-1)
        return [out.view(rows, batch, *self.in_shape)], constant

    def carried(self, *sizes: Tensor) -> Tensor:
        return self.forward(*sizes)

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        """An input passes its window's gradient on if it is the maximum: surely, never, or by a share in [0, 1]."""
        (box,) = boxes
        assert box is not None
        low, high = self._windows(box.lb), self._windows(box.ub)
        greatest, runner_up = (high.topk(2, dim=2).values if high.shape[2] > 1 else _pair_with_nothing(high)).unbind(2)
        others = torch.where(
            (high == greatest.unsqueeze(2)) & (high > runner_up.unsqueeze(2)),
            runner_up.unsqueeze(2),
            greatest.unsqueeze(2),
        )
        # Strict comparisons: where two inputs can be equal, Clarke's set holds both choices.
        lower = (low > others).to(box.lb.dtype)
        upper = (high >= low.amax(2, keepdim=True)).to(box.lb.dtype)
        places = self._places(box.lb.device)
        return [Route(lower, torch.where(places < 0, 0.0, upper), places, self.in_shape)]

    def lipschitz(self, norm: str) -> float:
        """A maximum moves no more than its inputs do; a pixel that m windows share counts in up to m maxima."""
        places = self._places(torch.device("cpu")).flatten()
        shared = float(torch.bincount(places[places >= 0]).max())
        return {"linf": 1.0, "l2": math.sqrt(shared), "l1": shared}[norm]

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, return_indices=True
        )

    def _upper(self, box: AnyBox, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(greatest upper bound of each window, whether its chosen input is at least all others on the whole box)."""
        ceiling, _ = self._pool(box.ub)
        floor = self._pool(box.lb)[0].flatten(2)
        windows = self._windows(box.ub)  # [B, C, k, L]
        is_chosen = self._places(box.lb.device) == chosen.flatten(2).unsqueeze(2)
        others = windows.masked_fill(is_chosen, -torch.inf).amax(2)
        return ceiling, (floor >= others).view_as(ceiling)

    def _windows(self, x: Tensor) -> Tensor:
        """Inputs of each window `[B, C, k, L]`, -inf where the window reaches outside the image."""
        places = self._places(x.device)
        padded = torch.cat([x.flatten(2), x.new_full((*x.shape[:2], 1), -torch.inf)], 2)
        return padded[:, :, torch.where(places < 0, x.shape[2] * x.shape[3], places)]

    def _places(self, device: torch.device) -> Tensor:
        """Position in H * W of each window's inputs `[k, L]`, -1 outside the image."""
        height, width = self.in_shape[1:]
        size = self._pool(torch.zeros(1, 1, height, width))[0].shape[2:]
        axes = []
        for out, stride, pad, dilation, k, limit in zip(
            size, self.stride, self.padding, self.dilation, self.kernel_size, (height, width), strict=True
        ):
            place = torch.arange(out)[None, :] * stride - pad + torch.arange(k)[:, None] * dilation
            axes.append(torch.where((place >= 0) & (place < limit), place, -1))
        rows, cols = axes
        grid = rows[:, None, :, None] * width + cols[None, :, None, :]
        inside = (rows[:, None, :, None] >= 0) & (cols[None, :, None, :] >= 0)
        return torch.where(inside, grid, -1).reshape(rows.shape[0] * cols.shape[0], -1).to(device)


def _pair_with_nothing(single: Tensor) -> Tensor:
    return torch.cat([single, torch.full_like(single, -torch.inf)], 2)


@dataclass(frozen=True)
class Route(Op):
    """Sends the number of each window to its inputs, each times a factor in [lower, upper], and adds up.

    The shares of one window add up to 1, which is not used: enclosures hold for any factors in the ranges.

    Attributes:
        lower, upper: `[B, C, k, L]` for k inputs of L windows, in [0, 1].
        places: position in H * W of each window's inputs `[k, L]`, -1 where there is none.
        in_shape: (C, H, W), the shape that this op gives.
    """

    lower: Tensor
    upper: Tensor
    places: Tensor
    in_shape: tuple[int, ...]

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        low, high = products(self._windows(box), self.lower, self.upper)
        return Interval.from_box(self._collect(low), self._collect(high))

    def loose(self, box: AnyBox) -> Tensor:
        free = (self.upper > self.lower).any(2).view_as(box.lb)
        return (box.lb < 0) & (box.ub > 0) & free

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        (box,) = boxes
        assert box is not None
        lines = product_lines(self._windows(box), self.lower, self.upper)
        flat = A.flatten(3)
        flat = torch.cat([flat, flat.new_zeros(*flat.shape[:3], 1)], 3)
        spread = flat[..., torch.where(self.places < 0, flat.shape[3] - 1, self.places)]  # [R, B, C, k, L]
        positive, negative = spread.clamp(min=0), spread.clamp(max=0)
        assert lines.lower_intercept is not None and lines.upper_intercept is not None
        constant = (positive * lines.lower_intercept + negative * lines.upper_intercept).flatten(2).sum(-1)
        through = (positive * lines.lower_slope + negative * lines.upper_slope).sum(3)
        return [through.view(*A.shape[:2], *box.lb.shape[1:])], constant

    def _windows(self, box: AnyBox) -> Box:
        return Box(box.lb.flatten(2).unsqueeze(2), box.ub.flatten(2).unsqueeze(2))

    def _collect(self, parts: Tensor) -> Tensor:
        batch, channels = parts.shape[:2]
        size = self.in_shape[1] * self.in_shape[2]
        index = torch.where(self.places < 0, size, self.places).flatten().expand(batch, channels, -1)
        out = parts.new_zeros(batch, channels, size + 1).scatter_add(2, index, parts.flatten(2))
        return out[..., :size].reshape(batch, *self.in_shape)


@RULES.module(nn.MaxPool2d)
def _max_pool(layer: nn.MaxPool2d, call: Call) -> Op:
    if layer.return_indices:
        raise call.refuse("MaxPool2d(return_indices=True) is not supported")
    return _build(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, call.args[0].shape)


@RULES.function(F.max_pool2d, torch.max_pool2d)
def _max_pool_call(call: Call) -> Op:
    kernel = call.argument(1, "kernel_size")
    stride = call.argument(2, "stride") or kernel
    return _build(
        kernel,
        stride,
        call.argument(3, "padding", 0),
        call.argument(4, "dilation", 1),
        call.argument(5, "ceil_mode", False),
        call.args[0].shape,
    )


def _build(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, in_shape: tuple[int, ...]) -> Op:
    return MaxPool2d(pair(kernel), pair(stride), pair(padding), pair(dilation), ceil_mode, in_shape)
