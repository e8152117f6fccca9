"""Confidence interval of a proportion."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval (low, high) of the chance of success after `successes` of `total` independent trials.

    Unlike the normal approximation it stays in [0, 1] and has a width at 0 and at `total` successes. Without trials it
    is (0, 1).

    Raises:
        ValueError: not 0 <= successes <= total, or confidence not inside (0, 1).

    Source: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= total:
        raise ValueError(f"expected 0 <= successes <= total, got {successes} of {total}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    # Exactly 0 and 1 in theory at the ends, where rounding would leave a crumb.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return low, high
