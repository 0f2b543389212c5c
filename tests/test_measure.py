"""The verdict over paired timings: rarely wrong about equals, seldom blind to five percent."""

import math
import random

import pytest

from fastvit.measure import interval, quartiles, verdict

ROUNDS, CASES = 25, 200


def timings(draw: random.Random, slowdown: float = 1.0) -> tuple[list[float], list[float]]:
    """Rounds of two entries as a busy machine gives them: 2 % of noise, now and then half as much again, and a
    drift of the clocks that both share."""

    def noise() -> float:
        return draw.lognormvariate(0, 0.02) * (1.5 if draw.random() < 0.04 else 1.0)

    drift = [1 + 0.1 * round / ROUNDS for round in range(ROUNDS)]
    return [d * noise() for d in drift], [d * slowdown * noise() for d in drift]


def verdicts(slowdown: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    pairs = (timings(draw, slowdown) for _ in range(CASES))
    return [verdict([theirs / ours for ours, theirs in zip(*pair, strict=True)]) for pair in pairs]


@pytest.mark.parametrize("seed", range(5))
def test_a_against_a_is_a_tie(seed):
    assert verdicts(1.0, seed).count("tie") >= 0.98 * CASES


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slowdown, called", [(1.05, "faster"), (1 / 1.05, "slower")])
def test_five_percent_are_called(seed, slowdown, called):
    found = verdicts(slowdown, seed)
    assert found.count(called) >= 0.9 * CASES
    assert found.count(called) + found.count("tie") == CASES


def test_eight_rounds_are_the_fewest_that_count():
    assert verdict([1.5] * 7) == "tie"
    assert verdict([1.5] * 8) == "faster"
    assert verdict([0.5] * 8) == "slower"


def test_quartiles_on_one_side_are_not_enough_nor_are_many_small_wins():
    assert verdict([1.1] * 8 + [0.9] * 2) == "tie"  # quartiles apart, but 8 of 10 is chance
    assert verdict([1.01] * 70 + [0.5] * 30) == "tie"  # the sign test alone would call it
    assert verdict([1.0] * 30) == "tie"


@pytest.mark.parametrize("rounds", [8, 12, 26, 51])
def test_the_interval_holds_the_true_median_in_99_cases_of_100(rounds):
    draw, cases = random.Random(rounds), 2000
    held = 0
    for _ in range(cases):
        low, high = interval([draw.lognormvariate(0.5, 0.05) for _ in range(rounds)])
        held += low <= math.exp(0.5) <= high
    assert held >= 0.985 * cases


@pytest.mark.parametrize("rounds", [7, 8, 12, 26, 51])
def test_a_tie_is_an_interval_that_holds_1_and_the_middle_half_lies_within(rounds):
    draw, seen = random.Random(rounds), set()
    for _ in range(300):
        centre = draw.choice((0.9, 0.97, 1.0, 1.03, 1.1))
        ratios = [draw.gauss(centre, 0.03) for _ in range(rounds)]
        (low, high), found, word = interval(ratios), quartiles(ratios), verdict(ratios)
        assert low <= found.q25 <= found.median <= found.q75 <= high
        assert word == ("faster" if low > 1 else "slower" if high < 1 else "tie")
        seen.add(word)
    assert seen == ({"tie"} if rounds < 8 else {"faster", "slower", "tie"})


def test_the_ends_of_an_interval():
    counted = [float(i) for i in range(1, 13)]
    assert interval(counted[:7]) == (-math.inf, math.inf)
    assert interval(counted[:8]) == (1.0, 8.0)
    assert interval(counted) == (2.0, 11.0)  # 1 of 12 may lie beyond an end: chance 2 * 13 / 4096
    many = [float(i) for i in range(51)]
    assert interval(many) == quartiles(many)[::2]  # wider than from many[15] to many[35]
    with pytest.raises(ValueError, match="values is empty"):
        interval([])


def test_quartiles_of_few():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="values is empty"):
        quartiles([])
