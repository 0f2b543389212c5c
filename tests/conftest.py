"""Test set-up: on a machine without a GPU, the kernels run in the repaired and sanitized interpreter.

FASTVIT_SANITIZER=off|bounds|race chooses what the interpreter checks (race, if not said). With a GPU the kernels run on
it, or in the interpreter as well where TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
import torch

# What a shell starts in the background ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from poison import poison_empty  # noqa: E402

from fastvit import dispatch, torchvision_shim, use_backend  # noqa: E402
from fastvit.dispatch import interpreting  # noqa: E402

if interpreting():
    from fastvit.interpret import install

    install(os.environ.get("FASTVIT_SANITIZER", "race"))
    # numpy's threads and torch's would fight for the cores.
    torch.set_num_threads(1)

from tuning import auto, table  # noqa: E402, F401

# timm and transformers import torchvision.
torchvision_shim.install()

# The fixtures of the files test_bench_*.py, which are skipped without Pillow.
if importlib.util.find_spec("PIL"):
    from bench_runs import add_peer, no_pictures, photos, quick  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory():
    """Memory that nothing wrote reads as NaN, so that a kernel that uses it is found by its result."""
    if not interpreting():
        yield
        return
    with poison_empty():
        yield


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    dispatch.forget()  # decisions that an earlier test's patches led to


@pytest.fixture
def device() -> str:
    """The device that the kernels run on."""
    return "cpu" if interpreting() else "cuda"


@pytest.fixture
def triton_backend():
    """Every op of the test runs on the Triton kernels, or raises."""
    with use_backend("triton"):
        yield
