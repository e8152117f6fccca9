"""Which items of a stream to attack, when each must be attacked or let go as it passes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

DEFAULT_WATCHED = 1 / math.e


def virtual_plus(
    values: Iterable[float], length: int, budget: int, watched: float = DEFAULT_WATCHED, fill: bool = False
) -> list[int]:
    """Positions that Virtual+ picks, in their order; at most `budget` of them, each decided before the next is seen.

    The first `watched` share of the stream is only looked at. From then on an item is picked when its value exceeds the
    smallest of the `budget` largest values so far, and joins them; picked or not, a value that was seen before counts.
    (Virtual, without the plus, picks only where the value that is pushed out comes from the watched share.)

    Args:
        values: worth of attacking each item, such as the loss that an attack reaches on it; read one at a time.
        length: number of items in the stream.
        budget: number of items that may be attacked.
        watched: share of the stream that is only looked at, rounded down to whole items.
        fill: pick the last items unseen rather than leave the budget unspent.

    Source: Mladenovic et al. (2022), "Online adversarial attacks", algorithm 2.
    """
    if not 1 <= budget <= length:
        raise ValueError(f"expected a budget from 1 to the length of the stream, {length}, got {budget}")
    if not 0 <= watched <= 1:
        raise ValueError(f"expected the watched share between 0 and 1, got {watched}")
    largest = [-math.inf] * budget
    picked: list[int] = []
    for position, value in enumerate(values):
        if position >= length:
            raise ValueError(f"the stream is longer than the {length} items that were announced")
        better = value > largest[0]
        if better:
            heapq.heapreplace(largest, value)
        forced = fill and length - position <= budget - len(picked)
        if len(picked) < budget and (forced or (better and position >= math.floor(watched * length))):
            picked.append(position)
    return picked


def competitive_ratio(values: list[float], picked: list[int]) -> float:
    """Sum of the picked values over the sum of as many largest ones, which hindsight would pick; 1 for no picks."""
    best = sum(heapq.nlargest(len(picked), values))
    return sum(values[position] for position in picked) / best if picked and best else 1.0
