"""Elementwise work on large tensors in pieces that stay in a core's cache.

A chain of n elementwise operations on tensors that do not fit reads and writes main memory n times; done piece by piece
it does so once. On a GPU one piece is best: there, every operation costs a launch.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

NUMBERS = 2**15
"""Numbers in a piece: 128 KiB in float32, so that half a dozen of them fit a 1 MiB second-level cache."""


def blocks(tensor: Tensor, axis: int = 0) -> Iterator[slice]:
    """Slices of `axis` that cut `tensor` into pieces of about NUMBERS numbers; one slice on other devices than CPUs."""
    count = tensor.shape[axis]
    if tensor.device.type != "cpu" or tensor.numel() <= NUMBERS:
        yield slice(0, count)
        return
    step = max(1, count * NUMBERS // tensor.numel())
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
