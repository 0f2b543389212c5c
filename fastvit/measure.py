"""What a set of timings says: quartiles, and whether one of two is faster. Used by the benchmarks and by the tuner."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

SIGNIFICANCE = 0.01  # of the sign test: at least 8 rounds are needed to call anything


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    q25: float
    median: float
    q75: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of the measurements. Raises ValueError for none at all."""
    if not values:
        raise ValueError("quartiles: values is empty, expected at least one measurement")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def verdict(ratios: Sequence[float]) -> str:
    """What paired ratios, the other's time over ours in each round, say of ours: "faster", "slower" or "tie".

    A tie unless both quartiles lie on one side of 1 and so do so many of the rounds that chance would explain it in
    less than one case of 100 (a two-sided sign test, in which rounds of exactly 1 have no voice).
    """
    low, _, high = quartiles(ratios)
    above, below = sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios)
    if low <= 1 <= high or _sign_test(above, below) >= SIGNIFICANCE:
        return "tie"
    return "faster" if low > 1 else "slower"


def _sign_test(above: int, below: int) -> float:
    """The chance that a fair coin falls at least as unevenly as this."""
    n = above + below
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(above, below) + 1)) / 2**n)
