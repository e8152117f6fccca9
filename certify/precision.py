"""The arithmetic in which bounds and witnesses are computed, and how far a computed bound can be trusted.

A bound is proven for real numbers and computed with rounded ones. Two quantities measure what rounding can do:

- `scale`, which every bound method returns: the sizes of the terms its last steps add up. It sees the cancellation in
  the final sum.
- `rounding_size`: an error analysis of the whole network. Every method evaluates, in one order or another, sums of
  products along the paths from the input to a row. Each rounding changes a term by at most one unit in the last place,
  and the change reaches the row through the weights behind it. Roundings are taken as independent: their squares add
  up. It sees the cancellation between large weights inside the network, which `scale` does not.

A row is proven only if its bound exceeds the shares of both that `ALLOWANCES` states for the precision. The shares are
calibrated, not proven: on published networks the errors of float32 bounds stay below 8e-6 of `scale` and below 500
units in the last place (2^-24) of `rounding_size`; float32 is given 12 times the first and 1024 of the second, float64
more than a thousand times as many units. Whatever falls into the float32 allowance is decided in float64.

What is certified is the network as a function of real numbers, with the weights that it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from certify.graph import Snapshot
from certify.interval import BallImage, Interval
from certify.op import Op
from certify.region import Region

Precision = Literal["float32", "float64"]

ALLOWANCES = {torch.float32: (1e-4, 2.0**-14), torch.float64: (1e-9, 2.0**-40)}
"""Shares of (`scale`, `rounding_size`) that a bound must exceed to prove its row."""


def proves(low: Tensor, scale: Tensor, size: Tensor) -> Tensor:
    """Whether lower bounds, computed in the dtype of `low`, show that their rows are positive; all `[B, R]`, bool."""
    of_scale, of_size = ALLOWANCES[low.dtype]
    # Positive evidence: every comparison with nan is False, and an infinite bound is an overflow.
    return torch.isfinite(low) & (low > 0) & (low > scale * of_scale) & (low > size * of_size)


def rounding_size(snapshot: Snapshot, region: Region) -> Tensor:
    """Root of the sum of the squared terms on all paths from the input to each output: `[B, R]`, not negative."""
    return rounding_sizes(snapshot, region)[-1]


@torch.no_grad()
def rounding_sizes(snapshot: Snapshot, region: Region) -> list[Tensor]:
    """The same for the value of every node, each `[B, *shape]`."""
    boxes: list[Interval] = [region.interval()]
    for node in snapshot.nodes[1:]:
        boxes.append(node.op.interval(*(boxes[i] for i in node.inputs)))
    return _summed(snapshot, [_magnitude(box) for box in boxes])


@torch.no_grad()
def rounding_at_points(snapshot: Snapshot, x: Tensor) -> Tensor:
    """`rounding_size` for bounds that evaluate the network at the points `x` alone, not on sets around them."""
    values = [x]
    for node in snapshot.nodes[1:]:
        values.append(node.op.forward(*(values[i] for i in node.inputs)))
    return _summed(snapshot, [value.abs() for value in values])[-1]


def _summed(snapshot: Snapshot, magnitudes: list[Tensor]) -> list[Tensor]:
    """The sums of `rounding_sizes` from the greatest absolute value of every node."""
    sizes = [magnitudes[0]]
    for node in snapshot.nodes[1:]:
        reached = [sizes[i] for i in node.inputs]
        if node.op.is_linear:
            inputs = [magnitudes[i] for i in node.inputs]
            terms = [torch.hypot(size, magnitude) for size, magnitude in zip(reached, inputs, strict=True)]
            sizes.append(torch.hypot(_spread(node.op, terms), _constant(node.op, inputs)))
        else:
            sizes.append(node.op.carried(*reached))
    return sizes


def _magnitude(box: Interval) -> Tensor:
    return box.center.abs() + box.radius


def _spread(op: Op, errors: list[Tensor]) -> Tensor:
    """Size of an affine op's output error for independent input errors of the given sizes.

    It is what the interval rule does to an l2 ball with these half-axes; ops without a rule for balls add the sizes up.
    """
    zeros = [torch.zeros_like(error) for error in errors]
    balls = [BallImage(z, e, e.new_ones(len(e))) for z, e in zip(zeros, errors, strict=True)]
    return op.interval(*(Interval(z, e, ball) for z, e, ball in zip(zeros, errors, balls, strict=True))).radius


def _constant(op: Op, inputs: list[Tensor]) -> Tensor:
    return op.forward(*(torch.zeros_like(value) for value in inputs))


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Full float32 products on every backend, and no autocast: TF32 keeps 10 bits, bfloat16 keeps 7."""
    settings = _precision_settings()
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    autocast = [torch.autocast(device, enabled=False) for device in devices]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        for context in autocast:
            context.__enter__()
        yield
    finally:
        for context in reversed(autocast):
            context.__exit__(None, None, None)
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def _precision_settings() -> list[tuple[object, str, object]]:
    """(owner, attribute, exact value) of the switches that this version of torch has; old and new ones do not mix."""
    backends = torch.backends
    if hasattr(getattr(backends.cudnn, "conv", None), "fp32_precision"):
        cudnn: Any = backends.cudnn
        mkldnn: Any = backends.mkldnn
        owners = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(_OldSwitch(), "matmul", "highest"), (backends.cudnn, "allow_tf32", False)]


class _OldSwitch:
    """The one switch for products of older versions: read as `allow_tf32` it would come back from medium as high."""

    @property
    def matmul(self) -> str:
        return torch.get_float32_matmul_precision()

    @matmul.setter
    def matmul(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)
