"""One decision, with a clock that is told what everything costs; and the real clock."""

import contextlib
import functools
import itertools

import pytest
import torch
from tuning import FakeClock

from fastvit import decide, tuned

TRUTH = torch.arange(1.0, 65.0)


def candidate(seconds, result=TRUTH):
    def run():
        if isinstance(result, Exception):
            raise result
        return (result.clone(),)

    run.seconds = seconds
    return [run]


def decided(sigma=1e-3, captures=True, **candidates):
    clock = FakeClock(lambda run: run.seconds, sigma, captures)
    return *decide.measure(candidates, torch.float32, 1, clock).choice(candidates), clock


@pytest.mark.parametrize(
    "challenger, sigma, winner",
    [
        (1 / 1.01, 1e-3, "ours"),  # by 1 %, beyond doubt: not worth it
        (1 / 1.03, 5e-2, "ours"),  # by 3 %, but in doubt
        (1 / 1.03, 1e-3, "theirs"),
        (1 / 1.05, 5e-3, "theirs"),
        (1.05, 5e-3, "ours"),
        (1.0, 5e-3, "ours"),
    ],
)
def test_a_challenger_must_win_clearly(challenger, sigma, winner):
    name, evidence, _ = decided(sigma, ours=candidate(1.0), theirs=candidate(challenger))
    assert name == winner
    assert set(evidence["seconds"]) == {"ours", "theirs"} and evidence["incumbent"] == "ours"
    low, median, high = evidence["seconds"]["theirs"]
    assert low < median < high and median == pytest.approx(challenger, rel=3 * sigma)


def test_quartiles_must_lie_apart_even_where_pairs_agree():
    incumbent = [1.0 + 0.1 * (i % 10) for i in range(50)]
    assert not decide.beats([t / 1.03 for t in incumbent], incumbent)
    assert decide.beats([t / 2 for t in incumbent], incumbent)
    assert not decide.beats([0.5] * 7, [1.0] * 7)  # too few rounds to call anything


def test_the_fastest_of_several_winners():
    name, *_ = decided(a=candidate(1.0), b=candidate(0.9), c=candidate(0.5), d=candidate(0.7))
    assert name == "c"


def test_what_is_wrong_is_never_timed():
    bad = TRUTH.clone()
    bad[3] *= 1.01
    name, evidence, clock = decided(
        ours=candidate(1.0),
        wrong=candidate(0.1, bad),
        nan=candidate(0.1, torch.full_like(TRUTH, float("nan"))),
        short=candidate(0.1, TRUTH[:-1]),
        half=candidate(0.1, TRUTH.half()),
        raising=candidate(0.1, RuntimeError("out of resource\nlong story")),
        none=candidate(0.1, RuntimeError()),
    )
    assert name == "ours"
    assert [run.seconds for run in clock.timed] == [1.0]
    dropped = evidence["dropped"]
    assert set(dropped) == {"wrong", "nan", "short", "half", "raising", "none"}
    assert dropped["wrong"].startswith("result 0 is wrong: off by") and "not finite" in dropped["nan"]
    assert dropped["raising"] == "RuntimeError: out of resource" and dropped["none"] == "RuntimeError: (no message)"


def test_what_rounding_explains_is_not_wrong():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        want = torch.randn(64, 64).to(dtype)
        near = (want.double() * (1 + torch.finfo(dtype).eps)).to(dtype)
        assert not decide.mismatch([near], [want], dtype, 1)
        row = want.clone()
        row[5, 7] = row[5, 7] + 1  # one element of 4096
        assert "off by" in decide.mismatch([row], [want], dtype, 1)
    with_infinity = torch.tensor([1.0, float("inf")])
    assert not decide.mismatch([with_infinity], [with_infinity.clone()], torch.float32, 1)


def test_the_incumbents_failure_is_no_decision():
    with pytest.raises(RuntimeError, match="no kernel"):
        decided(ours=candidate(1.0, RuntimeError("no kernel")), theirs=candidate(1.0))


def test_without_graphs_all_are_timed_alike():
    name, evidence, clock = decided(captures=False, ours=candidate(1.0), theirs=candidate(0.5))
    assert (name, evidence["graph"]) == ("theirs", False)
    assert "without graphs" in str(tuned.Entry(name, **evidence))


def test_candidates_that_write_into_one_buffer():
    buffer = torch.empty(8)

    def writes(value, upto=8):
        def run():
            buffer[:upto] = value
            return (buffer,)

        run.seconds = 1.0
        return [run]

    candidates = {"ours": writes(1.0, 7), "same": writes(1.0, 7)}  # neither writes the last
    candidates |= {"nothing": writes(0.0, 0), "less": writes(1.0, 6), "wrong": writes(2.0, 7)}
    clock = FakeClock(lambda run: run.seconds)
    measured = decide.measure(candidates, torch.float32, 1, clock, in_place=True)
    assert set(measured.dropped) == {"nothing", "less", "wrong"}
    assert (buffer[:7] == 1).all()  # and what others may read is as it was


def test_rounds_are_shuffled():
    order = []
    timers = {name: functools.partial(lambda name: order.append(name) or 1.0, name) for name in "abc"}
    measured = decide.interleave(timers)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) == 6
    assert {len(times) for times in measured.values()} == {decide.ROUNDS}


def test_the_real_clock_divides_by_what_it_ran(monkeypatch):
    """On a device that is not there: a call costs 10 us from Python, 2 us in a graph."""
    now, launched, capturing = 0.0, 0, None

    def run():
        nonlocal now, launched, capturing
        launched += 1
        if capturing is None:
            now += 10e-6
        else:
            capturing += 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1000

    class Graph:
        def replay(self):
            nonlocal now
            now += 2e-6 * self.calls

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        nonlocal capturing
        assert stream == "ours" and pool not in pools, "a pool that others use, too"
        pools.append(pool)
        capturing = 0
        yield
        graph.calls, capturing = capturing, None

    pools, restored, handles = [], [], itertools.count()
    fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None}
    fakes |= {"graph_pool_handle": lambda: (0, next(handles))}
    streams = {"Stream": lambda: "ours", "current_stream": lambda: "user's", "set_stream": restored.append}
    for name, fake in (fakes | streams).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = decide.CudaClock()
    for graph, seconds in ((True, 2e-6), (False, 10e-6)):
        timer = clock.timer([run, run, run], graph)
        before = now
        assert timer() == pytest.approx(seconds)
        assert decide.ROUND_SECONDS <= now - before < 3 * decide.ROUND_SECONDS
    assert restored == ["user's"]
