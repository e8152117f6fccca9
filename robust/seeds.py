"""Randomness keyed by what it is for, so that a run can be continued from any step without stored generator states."""

from __future__ import annotations

import hashlib

import torch


def seeded(device: torch.device | str, *key: object) -> torch.Generator:
    """Generator on `device` whose stream depends on the key alone, such as (seed, "attack", step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # 63 bits: manual_seed refuses numbers that no signed 64-bit integer holds.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
