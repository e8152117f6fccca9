"""Virtual+: a hand-worked stream, and its ratio over random orders."""

from __future__ import annotations

import random

import pytest

from attacks.online import competitive_ratio, virtual_plus


def test_a_stream_worked_by_hand():
    values = [3.0, 5.0, 1.0, 4.0, 6.0, 2.0, 7.0]
    # Watched: 3, 5. The two largest are {3, 5}; 4 beats 3 -> {4, 5}; 6 beats 4 -> {5, 6}: two picks, the budget.
    assert virtual_plus(values, 7, budget=2, watched=2 / 7 + 1e-9) == [3, 4]
    # With one place: {5}; 6 beats it. Virtual+ goes on comparing, and has no picks left for 7.
    assert virtual_plus(values, 7, budget=1, watched=2 / 7 + 1e-9) == [4]
    # The first item after the watched ones may be picked.
    assert virtual_plus([3.0, 5.0, 6.0, 1.0], 4, budget=1, watched=0.5) == [2]
    # The largest came in the watched part: nothing beats it, and only `fill` spends the budget.
    assert virtual_plus([9.0, 1.0, 2.0, 3.0], 4, budget=1, watched=0.25) == []
    assert virtual_plus([9.0, 1.0, 2.0, 3.0], 4, budget=1, watched=0.25, fill=True) == [3]


def test_items_are_decided_before_the_next_is_seen():
    values = [random.Random(0).random() for _ in range(40)]
    picked = virtual_plus(values, 40, budget=4)
    for end in range(40):
        other = values[: end + 1] + [5.0] * (39 - end)
        assert [p for p in virtual_plus(other, 40, budget=4) if p <= end] == [p for p in picked if p <= end]


def test_over_random_orders_it_beats_picking_blindly():
    shuffled = random.Random(1)
    ratios = []
    for _ in range(400):
        values = [float(i) ** 4 for i in range(50)]
        shuffled.shuffle(values)
        picked = virtual_plus(values, 50, budget=5, fill=True)
        assert len(picked) == 5
        ratios.append(sum(values[p] for p in picked) / sum(sorted(values)[-5:]))
    assert sum(ratios) / len(ratios) > 0.6  # blind picks get 0.24


def test_a_wrong_budget_and_a_longer_stream_are_refused():
    with pytest.raises(ValueError, match="expected a budget from 1 to the length of the stream, 3, got 4"):
        virtual_plus([1.0, 2.0, 3.0], 3, budget=4)
    with pytest.raises(ValueError, match="the stream is longer than the 2 items"):
        virtual_plus([1.0, 2.0, 3.0], 2, budget=1)
    assert competitive_ratio([1.0, 4.0, 3.0], [2]) == 0.75 and competitive_ratio([1.0], []) == 1.0
