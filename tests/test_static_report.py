"""The ahead-of-time report reads compiled code right, and lets every shipped kernel pass.

Compiling runs in a process of its own, since this one may interpret kernels instead of compiling them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import triton
from fastvit.benchmarks.static import compile, estimate, pages
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.heuristic import heuristic
from fastvit.kernels.launch.request import CONFIGS, GemmConfig
from fastvit.kernels.launch.search import search_space
from static_records import REQUEST, ROOT, request_of

REPORT = ROOT / "benchmarks" / "static_report.py"

SCRIPT = """
import sys, types

import torch
import triton
import triton.language as tl
from fastvit.benchmarks.static.compile import Case
from fastvit.benchmarks.static.gates import Allowed


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
def multiply_add(x_ptr, y_ptr, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    product = x * y
    if MASKED:
        product = tl.where(i < N, product, 0.0)
    tl.store(x_ptr + i, product + y)


@triton.jit
def softmax(x_ptr, N, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * N + j[None, :], mask=(j < N)[None, :], other=0.0) * scale
    x = tl.where((j < N)[None, :], x, float("-inf"))
    p = tl.exp2(x - tl.max(x, axis=1)[:, None])
    tl.store(x_ptr + i[:, None] * N + j[None, :], p / tl.sum(p, axis=1)[:, None], mask=(j < N)[None, :])


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


def fuse(masked, **options):
    x = empty(65536, dtype=torch.float32)
    multiply_add[(16,)](x, x, 65536, masked, 4096, **options)


def refuse():
    raise ValueError("first line\\nlast line")


CASES = [
    Case("good", launch),
    Case("good with other sizes", lambda: launch(m=1000, n=1536)),
    Case("good, odd width", lambda: launch(k=191)),
    Case("float32", lambda: launch(dtype=torch.float32, blocks=(32, 64, 32), num_warps=4, num_stages=2)),
    Case("spills", lambda: launch(blocks=(256, 256, 32), num_warps=4)),
    Case("too much shared memory", lambda: launch(blocks=(128, 128, 128), num_stages=5)),
    Case("no warpgroup", lambda: launch(blocks=(32, 64, 32), num_warps=4)),
    Case("fused", lambda: fuse(False)),
    Case("fusion behind a where", lambda: fuse(True)),
    Case("fusion switched off", lambda: fuse(False, enable_fp_fusion=False)),
    Case("softmax", lambda: softmax[(4,)](empty(256, 2048, dtype=torch.float32), 2000, 1.3, 4, 2048)),
    Case("wrong types", lambda: bad_types[(1,)](empty(4))),
    Case("refuses", refuse),
]
ALLOWED = (
    Allowed("no HGMMA", "a planted exception, to be let through", kernel="matmul", case="no warp*"),
    Allowed("spill", "a planted exception, for another Triton", triton="2.0.0", case="nothing"),
    Allowed("spill", "a planted exception, that nothing needs", arch="sm_8?", case="nothing"),
    Allowed("spill", "a planted exception, that sm_90 does not need", arch="sm_90", case="nothing"),
)
sys.modules["fastvit.benchmarks.static.cases"] = types.SimpleNamespace(cases=lambda: CASES)
sys.modules["fastvit.benchmarks.static.allowed"] = types.SimpleNamespace(ALLOWED=ALLOWED)
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
        done = run([script, "--json", out, *arguments])
        assert done.returncode in (0, 1), done.stderr
        records = {record["case"]: record for record in json.loads(out.read_text())["kernels"]}
        failures: dict[str, list[str]] = {case: [] for case in records}
        for line in done.stdout.splitlines():
            if found := re.match(r"FAILED (.*?): \S+ .* \((.*); .*\): ", line):
                failures[found[2]].append(found[1])
        return done, records, failures

    return report


@pytest.fixture(scope="module")
def hopper(planted):
    return planted("--arch", "sm_90")


def test_a_good_kernel_passes(hopper):
    _, records, failures = hopper
    good = records["good"]
    assert not failures["good"] and not good["error"]
    assert good["tensor_core"].keys() == {"HGMMA"} and good["dot"] == "16-bit"
    assert 64 <= good["registers"] <= 128 and good["spill_bytes"] == good["stack_bytes"] == 0
    # Three stages of two tiles of 128 x 64 bfloat16.
    assert good["shared_bytes"] == 3 * 2 * 128 * 64 * 2
    assert (good["blocks_per_sm"], good["warps"], good["occupancy"]) == (2, 8, 0.25)
    # Each of 256 threads copies a tile of 128 x 64 in four pieces of 16 bytes, and stores 64 numbers, eight at a time.
    assert good["async_copies"] == 3 * 2 * 4 and good["stores_by_bits"] == {"128": 8}
    assert good["loop"]["HGMMA"] == 4 and good["loop"]["LDGSTS"] == 8 and good["loop_loads_by_bits"] == {"128": 8}
    # 2 * 128 * 128 * 64 FLOPs from 2 * 128 * 64 elements of two bytes.
    assert good["flops_per_byte"] == 64


def test_equal_specialisations_are_compiled_once(hopper):
    _, records, _ = hopper
    assert "good with other sizes" not in records


def test_scalar_loads_in_the_main_loop_are_stopped(hopper):
    """A width that is no multiple of 16 forbids wide copies: the specialisation is the launch's own."""
    _, records, failures = hopper
    assert records["good, odd width"]["async_copies"] == 0
    assert records["good, odd width"]["loads_by_bits"].keys() == {"16"}
    assert failures["good, odd width"] == ["scalar loads"]


def test_float32_needs_no_warpgroup_instructions(hopper):
    _, records, failures = hopper
    assert records["float32"]["registers"] and records["float32"]["dot"] == "wide"
    assert not failures["float32"]


def test_spills_and_serialized_warpgroups_are_stopped(hopper):
    _, records, failures = hopper
    assert records["spills"]["spill_bytes"] > 1000 and records["spills"]["loop"]["LDL"]
    assert failures["spills"] == ["spill", "serialized"]


def test_shared_memory_over_the_limit_is_stopped(hopper):
    done, records, failures = hopper
    record = records["too much shared memory"]
    assert (record["blocks_per_sm"], record["limiter"]) == (0, "shared memory")
    assert "shared memory" in failures["too much shared memory"]
    assert f"needs {record['shared_bytes']} bytes of shared memory, sm_90 has 232448" in done.stdout


def test_missed_fusions_are_stopped_and_a_softmax_is_not(hopper):
    _, records, failures = hopper
    per_thread = 4096 // 128
    assert records["fused"]["missed_fusions"] == 0 and not failures["fused"]
    for case in ("fusion behind a where", "fusion switched off"):
        assert records[case]["missed_fusions"] == per_thread and failures[case] == ["missed fusion"]
    mix = records["softmax"]["rest"]
    assert mix["FADD"] >= 64 and mix["FMUL"] >= 64, "the softmax has nothing that could be taken for a missed fusion"
    assert records["softmax"]["missed_fusions"] == 0 and not failures["softmax"]


def test_errors_are_stopped(hopper):
    done, _, failures = hopper
    assert "does not compile: ValueError: last line" in done.stdout and failures["refuses"] == ["compile"]
    assert failures["wrong types"] == ["compile"] and "CompilationError" in done.stdout


def test_the_list_of_exceptions(hopper):
    """An entry lets its kernel through; one that a whole run did not need fails it; others' are left alone."""
    done, records, failures = hopper
    assert records["no warpgroup"]["tensor_core"].keys() == {"HMMA"} and not failures["no warpgroup"]
    assert "let through, no HGMMA: sm_90 matmul (no warpgroup;" in done.stdout
    needless = [line for line in done.stdout.splitlines() if line.startswith("FAILED needless exception")]
    assert len(needless) == 1 and needless[0].endswith("spill, Triton *, sm_90, *, nothing")


def test_the_exit_status_tells(hopper, planted):
    done, records, failures = hopper
    assert done.returncode == 1
    # One more for the exception that nothing needs.
    count = sum(map(len, failures.values())) + 1
    assert done.stdout.splitlines()[-1] == f"{len(records)} kernels, {count} failures, 1 let through"
    done, records, _ = planted("--arch", "sm_80", "gfx942", "--match", "no warpgroup")
    assert done.returncode == 0, done.stdout
    assert records.keys() == {"no warpgroup"}


def test_amd_code_is_read(planted):
    done, records, _ = planted("--arch", "gfx942", "--match", "good")
    good = records["good"]
    # Pipelined in registers: two tiles of bfloat16 in shared memory for each of its stages but one.
    assert good["tensor_core"]["v_mfma"] and good["registers"] and good["shared_bytes"] == 2 * 2 * 128 * 64 * 2
    assert good["loads_by_bits"]["128"] and good["stores_by_bits"]
    assert good["loop"]["v_mfma"] and good["loop_loads_by_bits"].keys() == {"128"}
    assert "scalar loads: gfx942 matmul (good, odd width;" in done.stdout


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


@pytest.mark.parametrize(
    "arch, match",
    [("sm_90", "block S/16 bf16"), *(pytest.param(arch, "", marks=pytest.mark.slow) for arch in ARCHS)],
)
def test_every_shipped_kernel_passes(tmp_path, arch, match):
    """With the configs that the heuristic picks for the architecture's own GPU."""
    done = run([REPORT, "--arch", arch, "--match", match, "--configs", "shipped", "--json", tmp_path / "records.json"])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert f"Triton {triton.__version__}" in done.stdout
    records = json.loads((tmp_path / "records.json").read_text())["kernels"]
    uses = [use for record in records for use in record["uses"]]
    assert {request_of(use["request"]).kernel for use in uses} == CONFIGS.keys()
    gpu = ARCHS[arch]
    if not compile.tuned_configs(gpu):
        for use in uses:
            expected = heuristic(request_of(use["request"]), gpu, gpu.sms)
            assert use["config"] == estimate.config_text(expected), use["request"]


@pytest.mark.slow
def test_candidates_of_the_tuner_are_compiled_where_a_case_asks(tmp_path):
    out = tmp_path / "records.json"
    done = run([REPORT, "--arch", "sm_90", "--match", "attention d=64 bf16", "--json", out])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    records = json.loads(out.read_text())["kernels"]
    candidates = [record for record in records if not record["shipped"]]
    assert {record["case"] for record in candidates} == {"attention d=64 bf16"}
    assert {record["case"] for record in records} == {"attention d=64 bf16", "attention d=64 bf16, masked"}
    for record in candidates:
        request = request_of(record["uses"][0]["request"])
        first, *others = map(estimate.config_text, search_space(request, ARCHS["sm_90"], ARCHS["sm_90"].sms))
        assert all(use["config"] in others for use in record["uses"])
    assert len(candidates) == 3 * compile.CANDIDATES


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished(tmp_path):
    (tmp_path / "planted.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "results" / "records.json"
    command = [sys.executable, tmp_path / "planted.py", "--json", out]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not out.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; finished: sm_80" in said
    archs = {record.arch for record in pages.load(out).records}
    assert "sm_80" in archs and "gfx942" not in archs
    # What is not whole makes no pages.
    done = run(["-m", "fastvit.benchmarks.static.pages", tmp_path / "pages", out])
    assert done.returncode == 2 and f"{out}: not of all cases on all architectures" in done.stderr
    assert not (tmp_path / "pages").exists()


def test_configs_of_shipped_tables_are_compiled(tmp_path):
    """They are for any shape of the same code; another architecture's are not."""
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4, "GROUP_M": 8, "SPLIT_K": 1}
    for name, capability in (("h100", "9.0"), ("a100", "8.0"), ("mi300x", "9.4")):
        table = {"identity": {"capability": capability}, "configs": {REQUEST.key: {"choice": {"GemmConfig": config}}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
        config["num_stages"] -= 1
    stages = {}
    for arch in ARCHS.values():
        for key, found in compile.tuned_configs(arch, tmp_path).items():
            assert key == "gemm bfloat16 matrix matrix linear" and type(found[0]) is GemmConfig
            stages[arch.name] = [config.num_stages for config in found]
    assert stages == {"sm_90": [4], "sm_80": [3], "gfx942": [2]}
