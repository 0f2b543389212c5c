"""Single ops under pytest-benchmark: `pytest benchmarks --benchmark-only`.

On a GPU the Triton kernels beside PyTorch at a batch of real work, on a CPU PyTorch alone at a small one.
Only `fastvit bench` checks the results and pairs the rounds: this is for looking at one op while working on it.
"""

from __future__ import annotations

import pytest
import torch
from fastvit.benchmarks import ops
from fastvit.benchmarks.cases import MODES, OPS, Case

import fastvit

pytest.importorskip("pytest_benchmark")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MODEL, BATCH, DTYPE = ("vit_base_patch16_224", 64, torch.bfloat16) if ON_GPU else ("vit_tiny_patch16_224", 2, None)


@pytest.mark.parametrize("backend", ["triton", "torch"] if ON_GPU else ["torch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, op, mode, backend):
    case = Case(MODEL, DTYPE or torch.float32, BATCH, mode, op)
    arguments = ops.inputs(case, DEVICE)
    wanted = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]

    def run():
        out = getattr(fastvit.ops, op)(**arguments)
        if mode == "training":
            torch.autograd.grad(out.sum(), wanted)
        if ON_GPU:
            torch.cuda.synchronize()

    with fastvit.use_backend(backend):
        benchmark(run)
    benchmark.extra_info.update(case=case.id, device=DEVICE)
