"""MaxPool2d with any kernel, stride, padding and dilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.interval import Interval
from certify.op import RULES, AnyBox, Call, Op
from certify.ops.affine import pair


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
