"""Random numbers for attacks: from one stream for the whole batch, or from one private stream per example.

With one stream per example the noise of an example does not depend on the batch it happens to be in, so results can
be regrouped and resumed. Noise is drawn on the generator's device and moved to where it is needed: streams on the CPU
give the same noise whatever device the attack runs on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Sampler = Callable[..., Tensor]
"""torch.rand, torch.randn and their kind: (shape, dtype=, device=, generator=) -> numbers."""

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One stream for the batch, one per example (`len(generators) == B`), or None for torch's global stream."""


def uniform(shape: Sequence[int], like: Tensor, generators: Generators) -> Tensor:
    """Uniform numbers in [0, 1), `shape` = [B, ...], with the dtype and device of `like`."""
    return _draw(torch.rand, shape, like, generators)


def normal(shape: Sequence[int], like: Tensor, generators: Generators) -> Tensor:
    """Standard normal numbers, `shape` = [B, ...], with the dtype and device of `like`."""
    return _draw(torch.randn, shape, like, generators)


class Share(torch.Generator):
    """The noise of some rows of a batch whose other rows are elsewhere, on other processes.

    What is drawn for those rows (or for several points of each, side by side) is cut from a draw for the whole batch,
    so that all processes together have what one would draw. Noise of another length (rows dropped) comes from a stream
    of this share alone, which is what the object itself is.

    Args:
        whole: stream of the batch, in the same state on every process.
        rows: numbers of the rows, int64 `[b]`. count: rows of the whole batch.
    """

    def __new__(cls, whole: torch.Generator, rows: Tensor, count: int) -> Share:
        return super().__new__(cls, whole.device)  # type: ignore[call-arg]

    def __init__(self, whole: torch.Generator, rows: Tensor, count: int) -> None:
        self.whole, self.rows, self.count = whole, rows, count
        self.manual_seed(_mix(whole.initial_seed(), *rows[:1].tolist()))


def draw(
    sampler: Sampler, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers `shape` = [B, ...] on the generator's device; those of its rows where it is a Share."""
    if isinstance(generator, Share) and shape[0] and shape[0] % len(generator.rows) == 0:
        whole, points = generator.whole, shape[0] // len(generator.rows)
        drawn = sampler((generator.count * points, *shape[1:]), dtype=dtype, device=whole.device, generator=whole)
        return drawn.unflatten(0, (generator.count, points))[generator.rows.to(drawn.device)].flatten(0, 1)
    return sampler(tuple(shape), dtype=dtype, device=generator.device, generator=generator)


def streams(seed: int, positions: Iterable[int], *keys: int) -> list[torch.Generator]:
    """One CPU generator per example, keyed by (seed, keys, position): `keys` tells restarts and attacks apart."""
    return [torch.Generator().manual_seed(_mix(seed, *keys, position)) for position in positions]


def _mix(*numbers: int) -> int:
    # Neighbouring seeds of a Mersenne twister are not independent enough to be added up or shifted; a hash is.
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def _draw(sampler: Sampler, shape: Sequence[int], like: Tensor, generators: Generators) -> Tensor:
    if generators is None:
        return sampler(shape, dtype=like.dtype, device=like.device)
    if isinstance(generators, torch.Generator):
        return draw(sampler, shape, generators, like.dtype).to(like.device)
    if len(generators) != shape[0]:
        raise ValueError(f"expected one generator per example: {shape[0]} examples, {len(generators)} generators")
    rows = [sampler(shape[1:], dtype=like.dtype, device=g.device, generator=g) for g in generators]
    return torch.stack(rows).to(like.device) if rows else like.new_empty(tuple(shape))
