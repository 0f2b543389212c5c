"""The clock work: rounds that are paired and in random order, noise that is not called a difference, memory."""

import contextlib
import random
import statistics
import weakref
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from fastvit.benchmarks import ops, timing
from fastvit.benchmarks.cases import Case

from fastvit import graphs
from fastvit.measure import verdict


class Machine:
    """A clock that only its calls move forward, and what disturbs a real one."""

    def __init__(self, monkeypatch, seed=0, noise=0.0, spikes=0.0, drift=0.0):
        self.now, self.draw = 0.0, random.Random(seed)
        self.noise, self.spikes, self.drift = noise, spikes, drift
        self.ran = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds

    def call(self, name, seconds):
        def run():
            self.ran.append(name)
            took = seconds * max(0.1, self.draw.gauss(1, self.noise)) * (1 + self.drift * self.now)
            self.now += took * (1.5 if self.draw.random() < self.spikes else 1)

        return run

    def interleave(self, seconds=60.0, **durations):
        calls = {name: self.call(name, duration) for name, duration in durations.items()}
        return timing.interleave(calls, timing._wall, seconds)


def ratios(measured, other, ours="ours"):
    return [b / a for a, b in zip(measured[ours], measured[other], strict=True)]


@pytest.mark.parametrize("work", [0.01, 0.3], ids=["some calls a round", "one call a round"])
@pytest.mark.parametrize(("factor", "call", "least"), [(1.0, "tie", 95), (1.05, "faster", 90), (0.95, "slower", 90)])
def test_the_same_is_a_tie_and_five_percent_are_seen(monkeypatch, factor, call, least, work):
    """2 % of noise on every call, one in fifty takes half as long again, and the machine slows down by a fifth."""
    called, seconds = [], 70 * (max(work, timing.ROUND_SECONDS) + timing.PAUSE_SECONDS)
    for seed in range(100):
        machine = Machine(monkeypatch, seed, noise=0.02, spikes=0.02, drift=0.2 / seconds)
        measured, _ = machine.interleave(seconds, ours=work, peer=factor * work)
        assert len(measured["ours"]) >= 21
        called.append(verdict(ratios(measured, "peer")))
    assert called.count(call) >= least, {word: called.count(word) for word in set(called)}


def test_a_library_whose_threads_go_on_spinning_does_not_slow_the_next(monkeypatch):
    machine = Machine(monkeypatch)
    until = 0.0

    def spinning():
        nonlocal until
        machine.now += 0.02
        until = machine.now + 0.02

    def next_one():
        machine.now += 0.04 if machine.now < until else 0.02

    measured, _ = timing.interleave({"a": spinning, "b": next_one}, timing._wall, 2.0)
    assert measured["b"] == pytest.approx([0.02] * len(measured["b"]))


def test_five_percent_are_seen_in_the_fewest_rounds(monkeypatch):
    called = []
    for seed in range(100):
        measured, _ = Machine(monkeypatch, seed, noise=0.02).interleave(seconds=1e-9, ours=1.0, peer=1.05)
        assert len(measured["ours"]) == timing.MIN_ROUNDS
        called.append(verdict(ratios(measured, "peer")))
    assert called.count("faster") >= 85


def test_drift_falls_on_all_alike(monkeypatch):
    """A machine that slows down steadily must not favour either side."""
    measured, _ = Machine(monkeypatch, drift=1e-3).interleave(200.0, a=1.0, b=2.0)
    assert statistics.median(ratios(measured, "b", "a")) == pytest.approx(2.0, rel=0.01)
    assert measured["a"][-1] > 1.1 * measured["a"][0]


def test_rounds_run_in_random_order(monkeypatch):
    machine = Machine(monkeypatch)
    measured, _ = machine.interleave(a=1.0, b=1.0)
    rounds = len(measured["a"])
    order = machine.ran[-2 * rounds :]
    assert {tuple(order[i : i + 2]) for i in range(0, len(order), 2)} == {("a", "b"), ("b", "a")}


def test_the_number_of_rounds_follows_from_the_time(monkeypatch):
    """The pauses are part of it."""
    one = 2 * (1.0 + timing.PAUSE_SECONDS)

    def rounds(seconds):
        return len(Machine(monkeypatch).interleave(seconds, a=1.0, b=1.0)[0]["a"])

    assert [rounds(1e-9), rounds(29.5 * one), rounds(1e9)] == [timing.MIN_ROUNDS, 30, timing.MAX_ROUNDS]


@pytest.mark.parametrize("single", [1e-4, 0.03, 0.2, 1.5])
@pytest.mark.parametrize("seconds", [1e-9, 5.0, 60.0])
@pytest.mark.parametrize("calls", [1, 4])
def test_how_long_it_takes_is_known_before(monkeypatch, single, seconds, calls):
    machine = Machine(monkeypatch)
    machine.interleave(seconds, **{str(i): single for i in range(calls)})
    assert timing.interleave_seconds(single, calls, seconds, "cpu") == pytest.approx(machine.now, rel=0.15)


def test_quick_calls_are_repeated_until_a_round_can_be_timed(monkeypatch):
    machine = Machine(monkeypatch)
    measured, _ = machine.interleave(1e-9, a=timing.ROUND_SECONDS / 10)
    assert measured["a"] == pytest.approx([timing.ROUND_SECONDS / 10] * timing.MIN_ROUNDS)
    # Two calls to see how long they take, then rounds of ten: one to warm up.
    assert len(machine.ran) in (2 + 10 * (1 + timing.MIN_ROUNDS), 2 + 11 * (1 + timing.MIN_ROUNDS))


def test_a_call_is_warmed_up_until_it_is_no_longer_getting_faster(monkeypatch):
    machine, calls = Machine(monkeypatch), count()

    def getting_faster():
        machine.now += max(1.0, 3.0 - 0.25 * next(calls))

    assert timing.warm_up(getting_faster, timing._wall, 1e9) == 1.0
    assert 8 + timing.STEADY <= next(calls) < timing.MAX_WARM_UPS
    endless = iter(0.99**i for i in range(10**6))

    def always_faster():
        machine.now += next(endless)

    timing.warm_up(always_faster, timing._wall, 1e9)
    assert next(endless) >= 0.99 ** (timing.MAX_WARM_UPS + 5)


@pytest.mark.parametrize("fails_at", [0, 12], ids=["at once", "in a round"])
def test_a_call_that_raises_is_left_out_and_the_others_go_on(monkeypatch, fails_at):
    machine, calls = Machine(monkeypatch), count()
    right = machine.call("b", 1.0)

    def broken():
        right()
        if next(calls) >= fails_at:
            raise RuntimeError("no more")

    measured, failures = timing.interleave({"a": machine.call("a", 1.0), "b": broken}, timing._wall, 60.0)
    assert len(measured["a"]) >= timing.MIN_ROUNDS
    assert list(measured) == ["a"]
    assert str(failures["b"]) == "no more"


@pytest.mark.parametrize("fails_at", [0, 12], ids=["at once", "in a round"])
def test_what_a_failed_call_held_is_given_back(monkeypatch, fails_at):
    """Its activations would be missing on the GPU while the others are timed."""
    machine, calls, held = Machine(monkeypatch), count(), []

    def broken():
        machine.now += 1.0
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        if next(calls) >= fails_at:
            raise RuntimeError("no more")

    def other():
        machine.now += 1.0
        alive.append(any(ref() is not None for ref in held))

    alive = []
    _, failures = timing.interleave({"b": broken, "a": other}, timing._wall, 60.0)
    assert failures and alive and not any(alive)


def test_convolutions_are_as_exact_as_matrix_products():
    conv, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("tf32", True), ("ieee", False)):
            conv.allow_tf32, matmul.fp32_precision = not expected, precision
            timing.pin_precision()
            assert conv.allow_tf32 is expected
    finally:
        matmul.fp32_precision = before


class Cuda:
    """Stand-ins for a GPU's streams, graphs and allocator. As PyTorch does, a capture that an illegal call broke raises
    at its end, in a stream that stays in force and with a pool that goes on recording."""

    def __init__(self, monkeypatch):
        self.current, self.pools, self.recording, self.captures = "default", count(1), set(), []
        self.used, self.kept, self.made = [], [], []
        monkeypatch.setattr(timing.torch, "cuda", self)
        monkeypatch.setattr(timing.torch._C, "_cuda_endAllocateToPool", self._end, raising=False)
        monkeypatch.setattr(
            timing.torch._C, "_cuda_releasePool", lambda *given: self.kept.remove(given[1]), raising=False
        )
        monkeypatch.setattr(graphs, "_broken", [])

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def CUDAGraph(self):
        graph = SimpleNamespace(was_reset=False)
        self.made.append(graph)
        graph.reset = lambda: setattr(graph, "was_reset", True)
        graph.replay = lambda: self.captures.append(graph)
        return graph

    def current_device(self):
        return 0

    def graph_pool_handle(self):
        return (0, next(self.pools))

    def current_stream(self):
        return SimpleNamespace(name=self.current, wait_stream=lambda other: None)

    def set_stream(self, stream):
        self.current = stream.name

    def stream(self, stream):
        return contextlib.nullcontext()

    def empty_cache(self):
        pass

    @contextlib.contextmanager
    def graph(self, graph, pool):
        if pool in self.recording:
            raise RuntimeError("already recording to mempool_id")
        before, self.current = self.current, "capture"
        self.used.append(pool)
        self.recording.add(pool)
        self.kept.append(pool)
        try:
            yield
        except IllegalInCapture:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        except BaseException:
            self.recording.discard(pool)
            self.current = before
            raise
        self.recording.discard(pool)
        self.current = before

    def _end(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.discard(pool)


class IllegalInCapture(RuntimeError):
    pass


def test_graphs_share_their_memory_and_hold_every_input(monkeypatch):
    cuda, ran = Cuda(monkeypatch), []
    calls = {name: lambda name=name: ran.append((name, cuda.current)) for name in ("a", "b")}
    found, failures = timing.replayed(calls, 5)
    assert (list(found), failures) == (["a", "b"], {})
    assert len(set(cuda.used)) == 1
    for name in calls:
        # Each of the five inputs is seen outside before it is captured.
        assert [where for who, where in ran if who == name] == ["default"] * 5 + ["capture"] * 5
    found["a"]()
    assert len(cuda.captures) == 1


@pytest.mark.parametrize("error", [IllegalInCapture, torch.OutOfMemoryError])
def test_a_capture_that_fails_leaves_everything_usable(monkeypatch, error):
    """The stream, the pools, and the captures of the others."""
    cuda = Cuda(monkeypatch)

    def broken():
        if cuda.current == "capture":
            raise error("no")

    found, failures = timing.replayed({"broken": broken, "a": lambda: None, "b": lambda: None}, 1)
    assert (list(found), list(failures)) == (["a", "b"], ["broken"])
    assert cuda.current == "default"
    assert not cuda.recording, "the allocator goes on recording"
    first, second, third = cuda.used
    assert first != second == third
    # Either PyTorch gives the pool back, when it forgets the graph, or we do.
    assert cuda.made[0].was_reset == (error is torch.OutOfMemoryError)
    assert (first in cuda.kept, len(graphs._broken)) == ((True, 0) if error is torch.OutOfMemoryError else (False, 1))


def test_the_hosts_time_is_taken_with_the_gpu_idle(monkeypatch):
    machine, order = Machine(monkeypatch), []

    def synchronize():
        order.append("idle")
        machine.now += 10.0

    monkeypatch.setattr(timing.torch, "cuda", SimpleNamespace(synchronize=synchronize))

    def call():
        order.append("call")
        machine.now += 0.5

    assert timing.host_seconds(call, 1e-9) == [0.5] * timing.HOST_CALLS
    assert order == ["idle", "call"] * timing.HOST_CALLS + ["idle"]
    assert timing.host_seconds(call, 1e9) == [0.5] * timing.MAX_ROUNDS


@pytest.mark.parametrize("single", [1e-5, 0.003, 0.4])
def test_steady_seconds_are_those_after_the_first_half_second(monkeypatch, single):
    """At first the clocks are higher; a launch, which costs as much however many calls follow it, does not count."""
    machine, launch, ran = Machine(monkeypatch), 20e-6, []

    def clock(call, repeats):
        start = machine.now
        machine.now += launch
        for _ in range(repeats):
            call()
        ran.append((start, repeats * single))
        return (machine.now - start) / repeats

    def call():
        machine.now += single / 2 if machine.now < 0.4 else single

    monkeypatch.setattr(timing, "timer", lambda device: {"cpu": clock}[device])
    assert timing.steady_seconds(call, "cpu") == pytest.approx(single, rel=0.01)
    windows = [seconds for start, seconds in ran if start >= timing.SETTLE_SECONDS]
    assert len(windows) >= 3
    assert min(windows) >= min(single, 0.9 * timing.ROUND_SECONDS)
    assert machine.now > 1.9 * timing.SETTLE_SECONDS


def test_the_threads_are_those_that_the_process_may_use(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    try:
        assert timing.pin_threads() == 3 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_spread():
    found = timing.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.q25, found.median, found.q75, found.rounds) == (2.0, 3.0, 4.0, 5)


def test_peak_memory_sees_what_a_call_takes_and_gives_back():
    megabytes = 64

    def call():
        block = torch.ones(megabytes << 20, dtype=torch.uint8)
        return block[0].item()

    peak = timing.peak_memory(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell the peak")
    assert peak == pytest.approx(megabytes << 20, rel=0.25)
    assert timing.peak_memory(lambda: None, "cpu") < 4 << 20


def test_joules_are_those_of_at_least_a_second():
    used, asked = [100.0], []

    def timer(call, repeats):
        asked.append(repeats)
        used[0] += 3.0 * repeats

    assert timing.joules(lambda: None, timer, lambda: used[0], single=0.004) == 3.0
    assert asked[0] * 0.004 >= timing.ENERGY_SECONDS
    assert timing.energy_counter("cpu") is None


def test_cold_copies_together_exceed_twice_the_cache(monkeypatch):
    monkeypatch.setattr(ops, "cache_bytes", lambda device: 1 << 20)
    arguments = ops.inputs(Case("vit_tiny_patch16_224", torch.float32, 1, "training", "layer_norm_mlp"), "cpu")
    copies = ops.cold(arguments, "cpu")
    one = sum(t.numel() * 4 for t in {id(t): t for t in arguments.values() if isinstance(t, torch.Tensor)}.values())
    assert len(copies) * one > 2 << 20
    assert (len(copies) - 1) * one <= 2 << 20
    addresses = {copy["x"].data_ptr() for copy in copies}
    assert len(addresses) == len(copies)
    for copy in copies:
        assert copy["residual"] is copy["x"]
        assert copy["fc1_weight"].requires_grad
        assert torch.equal(copy["x"], arguments["x"])
    # Never more memory than is reasonable, and never fewer than the arguments themselves.
    monkeypatch.setattr(ops, "cache_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(ops, "MOST_BYTES", 2 * one)
    assert len(ops.cold(arguments, "cpu")) == 2
    monkeypatch.setattr(ops, "MOST_BYTES", one // 2)
    assert len(ops.cold(arguments, "cpu")) == 1


def test_the_cache_of_this_processor_is_read():
    assert 1 << 18 <= timing.cache_bytes("cpu") <= 1 << 31
