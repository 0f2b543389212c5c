"""Compiling ahead of the tuner. Triton is taken to have an H100: the kernels are really compiled, and never run."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from fastvit import dispatch, precompile, tune
from fastvit.calls import MODES, calls_of
from fastvit.models.registry import model_entry

HEAD = """
import json, os, pathlib, subprocess, time
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from fastvit import dispatch, precompile, tune, tuned
from fastvit.kernels.launch import hardware
from fastvit.kernels.launch.absent import without_gpu
from fastvit.kernels.launch.request import GemmConfig

# Here, and in the workers, which import this file.
tune.KEEP = tune.MAX_COPIES = 1
os.sched_getaffinity = lambda process: range(3)  # two workers
TARGET, SMS = GPUTarget("cuda", 90, 32), 2  # so few that the heuristic takes other tiles


def call():
    shapes = (2, 70, 64), (72, 64), (72,), (2, 70, 72)
    tensors = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    return tune.Call.like(dispatch.OPS["linear_residual"], (*tensors, None, None))


def job(calls, settled=()):
    return precompile.Job(calls, TARGET, SMS, frozenset(settled), "none")


def cached(kind):
    return sorted(str(path) for path in pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob(f"*.{kind}"))
"""


@pytest.fixture
def script(tmp_path):
    """A function that starts `code` after HEAD, as a file of its own that interprets no kernels."""

    def start(code, **options):
        path = tmp_path / "script.py"
        path.write_text(HEAD + "\n" + textwrap.dedent(code))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.Popen([sys.executable, path], env=environment, stdout=subprocess.PIPE, text=True, **options)

    return start


def answer(process):
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out)


MEASURE = """
class Clock:
    def timer(self, runs, graph):
        return lambda: 1.0


def compile_only(kernel, *args, grid, warmup, **kwargs):
    launched.add(kernel.fn.__name__)
    return run(kernel, *args, grid=grid, warmup=True, **kwargs)


if __name__ == "__main__":
    # What the tuner does on a GPU, but for running the kernels and the time.
    hardware.num_sms = lambda device: SMS
    tuned._tables[torch.device("cpu")] = tuned.Table({}, pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / "table")
    run, launched, said, before = JITFunction.run, set(), [], cached("cubin")
    with without_gpu(TARGET, compile_only):
        tune.tune_call(call(), torch.device("cpu"), Clock(), said.append)
    print(json.dumps([sorted(launched), said, before, cached("cubin")]))
"""


@pytest.mark.slow
def test_the_tuner_finds_every_kernel_compiled(script):
    ahead = """
        if __name__ == "__main__":
            with precompile.ahead(job([call()])) as calls:
                print(json.dumps([call.op.name for call in calls]))
    """
    assert answer(script(ahead)) == ["linear_residual"]
    launched, said, before, after = answer(script(MEASURE))
    assert launched == ["column_sum_kernel", "gemm_kernel"]
    assert len(said) == 5 and not any("not tuned" in line for line in said), said
    assert before == after and len(after) > len(said)


@pytest.mark.slow
def test_neither_a_kernel_that_cannot_be_compiled_nor_a_dead_worker_stops_the_others(script):
    process = script("""
        pruned, kernels_of = tune.pruned, precompile.kernels_of
        # Three products are offered a tile that is no power of two.
        tune.pruned = lambda *args: {GemmConfig(100, 128, 64, 8, 3): 1.0} | pruned(*args)


        def with_death(call, job):
            return kernels_of(call, job) | {"last": lambda: os._exit(1)}


        precompile.kernels_of = with_death
        if __name__ == "__main__":
            with without_gpu(TARGET):
                wanted = kernels_of(call(), job([]))
            with precompile.ahead(job([call(), call()])) as calls:
                print(json.dumps([len(list(calls)), len(wanted) - 3, len(cached("cubin"))]))
    """)
    calls, wanted, compiled = answer(process)
    assert calls == 2 and compiled == wanted > 3


@pytest.mark.slow
def test_what_the_table_has_is_not_compiled(script):
    process = script("""
        if __name__ == "__main__":
            with without_gpu(TARGET, lambda *args, **kwargs: None):
                work = tune.placeholder(call())
                keys = [request.key for request in tune.requests_of([work])]
            with without_gpu(TARGET):
                found = [precompile.kernels_of(call(), job([], settled)) for settled in ((), keys, [work.key])]
            print(json.dumps([len(kernels) for kernels in found]))
    """)
    everything, as_it_is, nothing = answer(process)
    # Three products and a sum, the heuristic's choice of each, are launched by the op in any case.
    assert everything > as_it_is == 4 and nothing == 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGINT", "SIGKILL"])
def test_an_interruption_leaves_no_process(script, end):
    process = script(
        """
        # A compiler that does not end, in a process of its own as the assembler is; or ever more kernels.
        endless = lambda: subprocess.run(["sleep", "1000"])
        compile = {"SIGINT": endless, "SIGKILL": lambda: time.sleep(0.1)}[END]
        precompile.kernels_of = lambda call, job: dict.fromkeys(range(10000), compile)
        if __name__ == "__main__":
            with precompile.ahead(job([call()])) as calls:
                print("started", flush=True)
                next(calls)
    """.replace("[END]", f"[{end!r}]"),
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "started\n"
    enough = 6 if end == "SIGINT" else 4  # it, its tracker of resources, two workers and what they run
    until(lambda: len(session(process.pid)) == enough)
    time.sleep(0.5)
    if end == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.kill()
    _, err = process.communicate(timeout=30)
    assert "_work" not in err and err.count("Traceback") == (end == "SIGINT"), err
    until(lambda: not session(process.pid))


def session(leader):
    """The processes of a session, but those that have ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, leads, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(leads) == leader and state != "Z":
            found.append(path.parent.name)
    return found


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_call_is_measured_once_all_workers_are_through_with_it(monkeypatch):
    calls = calls_of(model_entry("vit_tiny_patch16_224").config, 8, torch.bfloat16, "inference")[:4]
    events, pipes = [], [multiprocessing.Pipe() for _ in range(3)]
    monkeypatch.setattr(tune, "tune_call", lambda call, *rest: events.append((calls.index(call), "measured")))

    def work(connection, share):
        for i in range(len(calls)):
            time.sleep(0.02 * share)
            events.append((i, "compiled"))
            if share == 2 and i == 2:
                return connection.close()  # as when a worker dies
            connection.send_bytes(b"")

    threads = [threading.Thread(target=work, args=(there, share)) for share, (_, there) in enumerate(pipes)]
    for thread in threads:
        thread.start()
    ready = precompile._in_time(calls, [here for here, _ in pipes], time.monotonic() + 30)
    assert tune.tune(ready, torch.device("cpu"), None) == 0
    for thread in threads:
        thread.join()
    for i in range(len(calls)):
        first = events.index((i, "measured"))
        assert events[:first].count((i, "compiled")) == (3 if i < 3 else 2)
    assert [i for i, what in events if what == "measured"] == [0, 1, 2, 3]


def test_waiting_ends_with_the_time():
    here, _open = multiprocessing.Pipe()
    call = object()
    with pytest.raises(tune.OutOfTime):
        next(precompile._in_time([call], [here], time.monotonic() + 0.05))
    _open.send_bytes(b"")
    with pytest.raises(tune.OutOfTime):
        next(precompile._in_time([call], [here], time.monotonic() - 1))
    assert next(precompile._in_time([call], [here], time.monotonic() + 30)) is call


def test_on_one_core_nothing_is_done_ahead(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    calls = [object(), object()]
    job = precompile.Job(calls, None, 132, frozenset(), "none")
    with precompile.ahead(job) as ready:
        assert list(ready) == calls and not multiprocessing.active_children()


@pytest.mark.parametrize("mode", MODES)
def test_every_call_travels(mode):
    calls = calls_of(model_entry("vit_tiny_patch16_224").config, 8, torch.bfloat16, mode)
    with torch.autocast("cpu", torch.bfloat16):
        calls.append(tune.Call.like(dispatch.OPS["layer_norm"], (torch.ones(2, 8), torch.ones(8), torch.ones(8), 1e-6)))
    for sent, got in zip(calls, pickle.loads(pickle.dumps(calls)), strict=True):
        assert got.op is sent.op and got.autocast is sent.autocast
        for ours, theirs in zip(got.args, sent.args, strict=True):
            if isinstance(theirs, torch.Tensor):
                same = ("device", "dtype", "shape", "requires_grad")
                assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
            else:
                assert ours == theirs
