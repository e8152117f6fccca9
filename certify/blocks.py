"""Elementwise work on large tensors in pieces that stay in a core's cache.

A chain of n elementwise operations on tensors that do not fit reads and writes main memory n times; done piece by piece
it does so once. On a GPU one piece is best: there, every operation costs a launch.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

NUMBERS = 2**17
"""Numbers in a piece, 512 KiB in float32: smaller ones cost more calls than they save (scripts/bench/RESULTS.md)."""


def blocks(tensor: Tensor, axis: int = 0, numbers: int = NUMBERS) -> Iterator[slice]:
    """Slices of `axis` that cut `tensor` into pieces of about so many numbers; one slice on other devices than CPUs."""
    count = tensor.shape[axis]
    if tensor.device.type != "cpu" or tensor.numel() <= numbers:
        yield slice(0, count)
        return
    step = max(1, count * numbers // tensor.numel())
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
