"""Records of compiled kernels and their requests, for the tests of the static report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from fastvit.benchmarks.static.record import Record
from fastvit.kernels import block_tiles, layer_norm_mlp, patch_embed, tiles
from fastvit.kernels.launch.request import Epilogue, Product, Prologue, Request, Rows, Scores

ROOT = Path(__file__).parents[1]

PARTS = {
    value.name: value
    for module in (tiles, block_tiles, layer_norm_mlp, patch_embed)
    for value in vars(module).values()
    if isinstance(value, (Prologue, Epilogue))
}


def request_of(key: str) -> Request:
    """The request of that key."""
    kernel, shape, dtype, *words = key.split(" ")
    dtype = getattr(torch, dtype)
    dtypes = {word.partition("=")[0]: getattr(torch, word.partition("=")[2]) for word in words if "=" in word}
    if kernel == "gemm":
        left, right, epilogue, *rest = (PARTS.get(word, word) for word in words if "=" not in word and word != "tma")
        memory = [dtypes.get(matrix, dtype) for matrix in ("left", "right", "out")]
        activation = int(rest[0]) if rest and rest[0].isdecimal() else rest[0] if rest else None
        parts = Product(left, right, epilogue, activation, *memory, "tma" in words)
    elif kernel.startswith("attention"):
        bias = dtypes.get("bias", dtype) if "bias" in words else None
        parts = Scores("mask" in words, bias, "bias_gradient" in words, "before_norm" in words)
    else:
        parts = Rows("residual" in words, dtypes.get("out"))
    return Request(kernel, tuple(map(int, shape.split("x"))), dtype, parts)


REQUEST = request_of("gemm 12608x768x3072 bfloat16 matrix matrix linear")


GOOD = Record("sm_90", "case", "kernel", "", dot="16-bit", warps=8, registers=100, blocks_per_sm=2,
              tensor_core={"HGMMA": 4}, limiter="registers", occupancy=0.25)  # fmt: skip


FLAWED = {
    "compile": replace(GOOD, error="it raised"),
    "spill": replace(GOOD, spill_bytes=4),
    "shared memory": replace(GOOD, shared_bytes=232449),
    "serialized": replace(GOOD, serialized=True),
    "no HGMMA": replace(GOOD, tensor_core={"HMMA": 4}),
    "scalar loads": replace(GOOD, loop_loads_by_bits={128: 7, 32: 4, 16: 4}),
    "narrow stores": replace(GOOD, stores_by_bits={128: 7, 16: 8}),
    "missed fusion": replace(GOOD, missed_fusions=8),
}
