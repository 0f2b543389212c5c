"""What a set of timings says: quartiles, and whether one of two is faster. Used by the benchmarks and by the tuner."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

SIGNIFICANCE = 0.01  # of a sign test: at least 8 rounds are needed to call anything


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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """What a verdict rests on: the ends of an interval that holds the true median of such measurements in 99 cases of
    100, and the middle half of these.

    The first is all that a two-sided sign test does not rule out: from one of the sorted measurements to another, and
    endless for fewer than 8. The second is the wider one from about 30 on: however many the rounds, a shift within what
    they differ by anyway is not called. Raises ValueError for no measurements at all.
    """
    low, _, high = quartiles(values)
    beyond = _most_beyond(len(values))
    if beyond is None:
        return -math.inf, math.inf
    ordered = sorted(values)
    return min(low, ordered[beyond]), max(high, ordered[-1 - beyond])


def verdict(ratios: Sequence[float]) -> str:
    """What paired ratios, the other's time over ours in each round, say of ours: "faster", "slower" or "tie", which is
    a ratio whose `interval` holds 1."""
    low, high = interval(ratios)
    return "faster" if low > 1 else "slower" if high < 1 else "tie"


def _most_beyond(n: int) -> int | None:
    """How many of n measurements may lie beyond an end of the interval: the most of which a two-sided sign test says
    that chance puts so few there in less than SIGNIFICANCE of all cases. None where not even 0 are so rare."""
    beyond, chance = None, 0.0
    for k in range(n):
        chance += 2 * math.comb(n, k) / 2**n
        if chance >= SIGNIFICANCE:
            break
        beyond = k
    return beyond
