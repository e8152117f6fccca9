"""Streams of noise depend on their key and on nothing else."""

from __future__ import annotations

import torch

from robust.seeds import seeded


def test_the_same_key_gives_the_same_stream_whatever_was_drawn_before() -> None:
    first = torch.rand(100, generator=seeded("cpu", 0, "attack", 7))
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(torch.rand(100, generator=seeded("cpu", 0, "attack", 7)), first)


def test_any_other_key_gives_another_stream() -> None:
    keys = [(seed, purpose, step) for seed in (0, 1, 10) for purpose in ("attack", "order") for step in range(50)]
    keys += [(0,), ("0",), (0, "attack"), (0, "attack", 0, 0)]
    starts = {tuple(torch.rand(2, generator=seeded("cpu", *key)).tolist()) for key in keys}
    assert len(starts) == len(keys)


def test_streams_are_the_same_in_every_process() -> None:
    """A value from another process: Python's own hash() of a text would differ."""
    assert torch.randint(10**6, (3,), generator=seeded("cpu", 0, "attack", 7)).tolist() == GOLDEN


GOLDEN = [402995, 815753, 462684]
