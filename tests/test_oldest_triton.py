"""The oldest Triton that is supported takes every kernel: its front end, which is where a newer one allows more.

`make static` compiles them to the end, in most of an hour. `make test` installs that Triton beside the tests' own.
"""

from __future__ import annotations

import re

import pytest
from scripts import run_script
from static_records import ROOT

SCRIPT = """
import tempfile

import triton
from fastvit.benchmarks.static import cases
from fastvit.benchmarks.static.compile import compiling_for, launches
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction


class Taken(Exception):
    pass


def no_further(*_):
    raise Taken


def add_stages(backend, stages, *args, **kwargs):
    all_of(backend, stages, *args, **kwargs)
    stages["ttgir"] = no_further


# What the front end branches on: what there is, and which function is given.
def structure(value):
    if isinstance(value, tuple):
        return tuple(map(structure, value))
    return value.fn.__name__ if isinstance(value, JITFunction) else None if value is None else type(value).__name__


all_of, CUDABackend.add_stages = CUDABackend.add_stages, add_stages
taken = set()
with tempfile.TemporaryDirectory() as triton.knobs.cache.dir:
    for launch in launches(cases.cases(), "sm_90"):
        assert not launch.error, (launch.case, launch.error)
        alike = launch.kernel.fn.__name__, structure((*launch.args, *launch.kwargs.values()))
        if alike in taken:
            continue
        taken.add(alike)
        try:
            with compiling_for(launch.arch):
                launch.kernel.run(*launch.args, grid=None, warmup=True, **launch.kwargs)
        except Taken:
            continue
        except Exception as error:
            raise AssertionError(f"{launch.kernel.fn.__name__} of {launch.case!r}: {error}") from error
        raise AssertionError("it was compiled further")
print(triton.__version__, len(taken))
"""


def test_the_oldest_triton_takes_every_kernel():
    oldest = re.search(r"TRITONS := (\S+)", (ROOT / "Makefile").read_text()).group(1)
    folder = ROOT / f".venv-static-{oldest}"
    if not folder.is_dir():
        pytest.skip(f"no Triton {oldest}, which make test installs")
    version, taken = run_script(SCRIPT, PYTHONPATH=f"{folder}:{ROOT}").split()
    assert version == oldest and int(taken) > 60
