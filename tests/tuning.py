"""What tests of the tuner share: a clock that is told what everything costs, an empty table, calls."""

import random

import pytest
import torch

from fastvit import dispatch, tune, tuned

CPU = torch.device("cpu")
IDENTITY = dict.fromkeys(("device", "capability", "driver", "torch", "triton", "kernels"), "fake")


class FakeClock:
    """Measures nothing: `price(run)` seconds, with noise."""

    def __init__(self, price, sigma=1e-3, captures=True):
        self.price, self.sigma, self.captures = price, sigma, captures
        self.timed = []

    def timer(self, runs, graph):
        if graph and not self.captures:
            raise RuntimeError("cannot be captured")
        self.timed.append(runs[0])
        seconds, draw = self.price(runs[0]), random.Random(len(self.timed))
        return lambda: seconds * draw.lognormvariate(0, self.sigma)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table for the interpreter's device, in force, kept in a file."""
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    table = tuned.load(IDENTITY)
    monkeypatch.setitem(tuned._tables, CPU, table)
    monkeypatch.setattr(tune, "KEEP", 2)
    monkeypatch.setattr(tune, "MAX_COPIES", 2)
    tuned.changed()
    yield table
    tuned.changed()


@pytest.fixture
def auto(monkeypatch):
    """Under "auto" the interpreter's device is taken for a GPU."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)


def norm_call(grad=False):
    x = torch.randn(2, 21, 24, requires_grad=grad)
    return tune.Call.like(dispatch.OPS["layer_norm"], (x, torch.ones(24), torch.zeros(24), 1e-6))


def attention_call(grad=False):
    qkv = torch.randn(2, 21, 3, 2, 16, dtype=torch.bfloat16, requires_grad=grad)
    return tune.Call.like(dispatch.OPS["attention"], (qkv, None, None, None, 0.0, None, None, False, None))


def price_of(cheap):
    """1 ms, and half of that for a config or candidate for which `cheap` holds."""

    def price(run):
        bound = run.args[0]
        return 0.5e-3 if cheap(bound) else 1e-3

    return price
