"""The ahead-of-time report reads compiled code right, and its gate stops each planted flaw.

It runs in a process of its own, since this one may interpret kernels instead of compiling them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SCRIPT = """
import sys, types

import torch
import triton
import triton.language as tl


@triton.jit
def matmul(a_ptr, b_ptr, out_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + i[:, None] * K + k[None, :], mask=(i < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + j[:, None] * K + k[None, :], mask=(j < N)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i[:, None] * N + j[None, :], out, mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def bad_types(x_ptr):
    acc = 0
    for _ in range(10):
        acc = tl.load(x_ptr)
    tl.store(x_ptr, acc)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(m=1576, n=768, k=192, blocks=(128, 128, 64), dtype=torch.bfloat16, num_warps=8, num_stages=3):
    a, b, out = empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(m, n)
    grid = lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(n, meta["BLOCK_N"]))
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks))
    matmul[grid](a, b, out, m, n, k, **sizes, num_warps=num_warps, num_stages=num_stages)
    return out.sum()


def refuse():
    raise ValueError("first line\\nlast line")


CASES = [
    ("good", launch),
    ("good with other sizes", lambda: launch(m=1000, n=1536)),
    ("good, odd width", lambda: launch(k=191)),
    ("float32", lambda: launch(dtype=torch.float32, blocks=(32, 64, 32), num_warps=4, num_stages=2)),
    ("spills", lambda: launch(blocks=(256, 256, 32), num_warps=4)),
    ("too much shared memory", lambda: launch(blocks=(128, 128, 128), num_stages=5)),
    ("no warpgroup", lambda: launch(blocks=(32, 64, 32), num_warps=4)),
    ("wrong types", lambda: bad_types[(1,)](empty(4))),
    ("refuses", refuse),
]
sys.modules["fastvit.benchmarks.static_cases"] = types.SimpleNamespace(cases=lambda: CASES)
from fastvit.benchmarks.static_report import main

sys.exit(main())
"""


def run(command: list, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env={**kept, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Runs the report over the planted cases: (arguments) -> its process, records by case, failures by case."""
    folder = tmp_path_factory.mktemp("planted")
    script, out = folder / "planted.py", folder / "records.json"
    script.write_text(SCRIPT)

    def report(*arguments: str):
        done = run([script, "--json", out, *arguments], TRITON_CACHE_DIR=str(folder / "cache"))
        assert done.returncode in (0, 1), done.stderr
        records = {record["case"]: record for record in json.loads(out.read_text())}
        failures: dict[str, list[str]] = {case: [] for case in records}
        for line in done.stdout.splitlines():
            if line.startswith("FAILED"):
                case = next(case for case in sorted(records, key=len, reverse=True) if f"({case};" in line)
                failures[case].append(line.partition("): ")[2])
        return done, records, failures

    return report


@pytest.fixture(scope="module")
def hopper(planted):
    return planted("--arch", "sm_90")


def test_a_good_kernel_passes(hopper):
    _, records, failures = hopper
    good = records["good"]
    assert not failures["good"] and not good["error"]
    assert good["tensor_core"].keys() == {"HGMMA"} and good["has_16_bit_dot"]
    assert 64 <= good["registers"] <= 128 and good["spill_bytes"] == good["stack_bytes"] == 0
    # Three stages of two tiles of 128 x 64 bfloat16.
    assert good["shared_bytes"] == 3 * 2 * 128 * 64 * 2
    assert (good["blocks_per_sm"], good["warps"], good["occupancy"]) == (2, 8, 0.25)
    # Each of 256 threads copies a tile of 128 x 64 in four pieces of 16 bytes, and stores 64 numbers, eight at a time.
    assert good["async_copies"] == 3 * 2 * 4 and good["stores_by_bits"] == {"128": 8}
    assert good["loop"]["HGMMA"] == 4 and good["loop"]["LDGSTS"] == 8


def test_equal_specialisations_are_compiled_once(hopper):
    _, records, _ = hopper
    assert "good with other sizes" not in records


def test_the_specialisation_is_the_launchs_own(hopper):
    """A width that is no multiple of 16 forbids wide copies: they must go too."""
    _, records, _ = hopper
    assert records["good, odd width"]["async_copies"] == 0
    assert records["good, odd width"]["loads_by_bits"].keys() == {"16"}


def test_float32_needs_no_warpgroup_instructions(hopper):
    _, records, failures = hopper
    assert records["float32"]["registers"] and not records["float32"]["has_16_bit_dot"]
    assert not any("HGMMA" in failure for failure in failures["float32"])


def test_spills_and_serialized_warpgroups_are_stopped(hopper):
    _, records, failures = hopper
    spill = records["spills"]["spill_bytes"]
    assert spill > 1000 and records["spills"]["loop"]["LDL"]
    assert failures["spills"] == [
        f"spills {spill} bytes of registers",
        "its warpgroup matrix instructions are serialized",
    ]


def test_shared_memory_over_the_limit_is_stopped(hopper):
    _, records, failures = hopper
    record = records["too much shared memory"]
    assert (record["blocks_per_sm"], record["limiter"]) == (0, "shared memory")
    reason = f"needs {record['shared_bytes']} bytes of shared memory, sm_90 has 232448"
    assert reason in failures["too much shared memory"]


def test_missing_warpgroup_instructions_are_stopped(hopper):
    _, records, failures = hopper
    assert records["no warpgroup"]["tensor_core"].keys() == {"HMMA"}
    assert failures["no warpgroup"] == ["multiplies 16-bit matrices without HGMMA"]


def test_errors_are_stopped(hopper):
    _, records, failures = hopper
    assert failures["refuses"] == ["does not compile: ValueError: last line"]
    assert len(failures["wrong types"]) == 1 and "CompilationError" in failures["wrong types"][0]


def test_the_exit_status_tells(hopper, planted):
    done, records, failures = hopper
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"{len(records)} kernels, {sum(map(len, failures.values()))} failures"
    done, records, _ = planted("--arch", "sm_80", "gfx942", "--match", "no warpgroup")
    assert done.returncode == 0, done.stdout
    assert records.keys() == {"no warpgroup"}


def test_a_kernel_in_tritons_cache_is_read_again(hopper, planted):
    _, records, failures = hopper
    _, again, failures_again = planted("--arch", "sm_90", "--match", "spills")
    assert again["spills"] == records["spills"] and failures_again["spills"] == failures["spills"]


def test_amd_code_is_read(planted):
    done, records, _ = planted("--arch", "gfx942", "--match", "good")
    assert done.returncode == 0, done.stdout
    good = records["good"]
    # Pipelined in registers: two tiles of bfloat16 in shared memory for each of its stages but one.
    assert good["tensor_core"]["MFMA"] and good["registers"] and good["shared_bytes"] == 2 * 2 * 128 * 64 * 2
    assert good["loads_by_bits"]["128"] and good["stores_by_bits"]


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set: kernels are interpreted, not compiled"),
        (["--match", "nonsense"], {}, "no case's label holds 'nonsense'"),
        (["--arch", "sm_1"], {}, "invalid choice: 'sm_1'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, environment, message):
    (tmp_path / "planted.py").write_text(SCRIPT)
    done = run([tmp_path / "planted.py", *arguments], **environment)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_every_kernel_compiles():
    done = run([BENCHMARKS / "static_report.py", "--arch", "sm_80", "sm_90", "gfx942"])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
