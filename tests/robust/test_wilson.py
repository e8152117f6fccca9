"""Wilson's interval against its definition and its ends."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from robust.wilson import wilson_interval


@pytest.mark.parametrize("total", [1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_no_success_gives_zero_and_only_successes_give_one_exactly(total: int, confidence: float) -> None:
    low, high = wilson_interval(0, total, confidence)
    assert low == 0.0
    assert 0 < high < 1
    assert wilson_interval(total, total, confidence) == (pytest.approx(1 - high), 1.0)


@pytest.mark.parametrize(("successes", "total"), [(1, 10), (5, 10), (9, 10), (487, 1000), (1, 10**6)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_ends_are_where_the_score_test_just_rejects(successes: int, total: int, confidence: float) -> None:
    z = norm.ppf((1 + confidence) / 2)
    share = successes / total

    def excess(p: float) -> float:
        return abs(share - p) - z * math.sqrt(p * (1 - p) / total)

    low, high = wilson_interval(successes, total, confidence)
    assert low == pytest.approx(brentq(excess, 1e-15, share, xtol=1e-16), rel=1e-9)
    assert high == pytest.approx(brentq(excess, share, 1 - 1e-15, xtol=1e-16), rel=1e-9)


def test_a_published_interval() -> None:
    # Newcombe, 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 15 of 148 gives 0.0624 to 0.1605.
    assert wilson_interval(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson_interval(15, 148) == (pytest.approx(0.0624, abs=5e-5), pytest.approx(0.1605, abs=5e-5))


def test_without_trials_nothing_is_known() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "total", "confidence"), [(-1, 3, 0.9), (4, 3, 0.9), (1, 3, 0.0), (1, 3, 1.0)])
def test_impossible_counts_are_refused(successes: int, total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(successes, total, confidence)
