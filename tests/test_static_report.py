"""The ahead-of-time report reads compiled code right, its gates stop each planted flaw, and its pages say what is so.

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
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import triton
from fastvit.benchmarks.static import allowed, compile, estimate, pages, read
from fastvit.benchmarks.static.gates import GATES, Allowed, findings, judge, unused
from fastvit.benchmarks.static.record import Record
from fastvit.kernels import gemm, layer_norm_mlp, patch_embed
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.heuristic import heuristic
from fastvit.kernels.launch.request import (
    CONFIGS,
    AttentionConfig,
    Epilogue,
    GemmConfig,
    Product,
    Prologue,
    Request,
    RowConfig,
    Rows,
    Scores,
)
from fastvit.kernels.launch.search import search_space

ROOT = Path(__file__).parents[1]
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


def request_of(key: str) -> Request:
    """The request of that key."""
    kernel, shape, dtype, *words = key.split(" ")
    dtype = getattr(torch, dtype)
    dtypes = {word.partition("=")[0]: getattr(torch, word.partition("=")[2]) for word in words if "=" in word}
    if kernel == "gemm":
        left, right, epilogue, *rest = (PARTS.get(word, word) for word in words if "=" not in word)
        memory = [dtypes.get(matrix, dtype) for matrix in ("left", "right", "out")]
        parts = Product(left, right, epilogue, *(rest or [None]), *memory)
    elif kernel.startswith("attention"):
        bias = dtypes.get("bias", dtype) if "bias" in words else None
        parts = Scores("mask" in words, bias, "bias_gradient" in words)
    else:
        parts = Rows("residual" in words, dtypes.get("out"))
    return Request(kernel, tuple(map(int, shape.split("x"))), dtype, parts)


PARTS = {
    value.name: value
    for module in (gemm, layer_norm_mlp, patch_embed)
    for value in vars(module).values()
    if isinstance(value, (Prologue, Epilogue))
}


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[pytest.mark.slow] * (arch != "sm_90")) for arch in ARCHS])
def test_every_shipped_kernel_passes(tmp_path, arch):
    """With the configs that the heuristic picks for the architecture's own GPU."""
    done = run([REPORT, "--arch", arch, "--configs", "shipped", "--json", tmp_path / "records.json"])
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


# ---- Gates and exceptions ----------------------------------------------------------------------------------------

GOOD = Record("sm_90", "case", "kernel", "", dot="16-bit", warps=8, registers=100, blocks_per_sm=2,
              tensor_core={"HGMMA": 4}, limiter="registers", occupancy=0.25)  # fmt: skip
FLAWED = {
    "compile": replace(GOOD, error="it raised"),
    "spill": replace(GOOD, spill_bytes=4),
    "shared memory": replace(GOOD, shared_bytes=232449),
    "serialized": replace(GOOD, serialized=True),
    "no HGMMA": replace(GOOD, tensor_core={"HMMA": 4}),
    "scalar loads": replace(GOOD, loop_loads_by_bits={128: 7, 32: 4, 16: 4}),
    "missed fusion": replace(GOOD, missed_fusions=8),
}


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_alone(gate):
    assert list(findings(FLAWED[gate])) == [gate] and not findings(GOOD)
    candidate = replace(FLAWED[gate], shipped=False)
    assert bool(judge([candidate], "3.6.0", ()).failures) == (gate in ("compile", "shared memory"))


@pytest.mark.parametrize(
    "record",
    [
        replace(GOOD, shared_bytes=232448),
        replace(GOOD, loop_loads_by_bits={128: 8, 32: 8}),
        replace(GOOD, loop_loads_by_bits={32: 7}),
        replace(GOOD, loop_loads_by_bits={32: 64}, dot=""),
        replace(GOOD, loop_loads_by_bits={32: 8}, loop={"UTMALDG": 8}),
        replace(GOOD, missed_fusions=7),
        replace(GOOD, tensor_core={}, dot="wide"),
        replace(GOOD, tensor_core={"HMMA": 4}, arch="sm_80"),
    ],
)
def test_what_is_still_good(record):
    assert not findings(record)


def test_an_exception_needs_a_reason_and_a_gate():
    for reason in ("", "   ", "known"):
        with pytest.raises(ValueError, match="expected a sentence"):
            Allowed("spill", reason)
    with pytest.raises(ValueError, match="gate is 'spills', expected one of compile, spill"):
        Allowed("spills", "for a good reason")


@pytest.mark.parametrize("field, other", [("arch", "sm_80"), ("triton", "3.9.*"), ("kernel", "gemm*"), ("case", "x")])
def test_an_exception_is_for_what_it_names_only(field, other):
    record = FLAWED["spill"]
    entry = Allowed("spill", "for a good reason", "sm_9?", "3.6.*", "kern*", "*se")
    assert not judge([record], "3.6.0", [entry]).failures and not unused([record], ["sm_90"], "3.6.0", [entry])
    elsewhere = replace(entry, **{field: other})
    assert judge([record], "3.6.0", [elsewhere]).failures
    assert judge([replace(record, spill_bytes=0, serialized=True)], "3.6.0", [entry]).failures


def test_an_exception_that_nothing_needs_is_found_by_a_run_that_covers_it():
    entry = Allowed("spill", "for a good reason", arch="sm_9?", triton="3.6.*")
    assert unused([GOOD], ["sm_90"], "3.6.0", [entry]) == [entry]
    assert unused([GOOD], ["sm_80"], "3.6.0", [entry]) == unused([GOOD], ["sm_90"], "3.9.0", [entry]) == []
    wider = replace(entry, arch="sm_*")
    assert unused([GOOD], ["sm_90"], "3.6.0", [wider]) == [] and unused([GOOD], ARCHS, "3.6.0", [wider]) == [wider]
    candidate = replace(FLAWED["spill"], shipped=False)
    assert unused([candidate], ["sm_90"], "3.6.0", [entry]) == [entry], "candidates need no exception"


def test_every_exception_is_judged_by_some_run():
    makefile = (ROOT / "Makefile").read_text()
    versions = re.search(r"^TRITONS := (.*)$", makefile, re.MULTILINE)[1].split()
    for entry in allowed.ALLOWED:
        assert any(fnmatchcase(version, entry.triton) for version in versions), entry
        assert any(fnmatchcase(arch, entry.arch) for arch in ARCHS), entry


@pytest.mark.parametrize(
    "lines, count",
    [
        (["mul.f32 %a, %x, %y", "add.f32 %b, %a, %z"], 0),  # ptxas fuses these
        (["mul.rn.f32 %a, %x, %y", "add.rn.f32 %b, %a, %z"], 1),
        (["mul.f32 %a, %x, %y", "selp.f32 %s, %a, 0f00000000, %p", "sub.f32 %b, %z, %s"], 1),
        (["mul.f32 %a, %x, %y", "selp.f32 %s, %a, 0f00000000, %p", "sub.f32 %b, %z, %s", "max.f32 %m, %s, %n"], 0),
        (["mul.f32 %a, %x, %y", "selp.f32 %s, %a, 0f00000000, %p", "st.shared.b32 [%r], %s"], 0),
        (["mul.f32 %a, %x, %y"], 0),
        (["ex2.approx.f32 %a, %x", "selp.f32 %s, %a, 0f00000000, %p", "add.f32 %b, %s, %z"], 0),
    ],
)
def test_missed_fusions_in_ptx(lines, count):
    assert read.missed_fusions("\n".join(f"\t{line};" for line in lines)) == count


# ---- Estimates and pages -----------------------------------------------------------------------------------------

REQUEST = request_of("gemm 12608x768x3072 bfloat16 matrix matrix linear")
CONFIG = GemmConfig(128, 128, 64, 8, 3)


def used(record: Record = GOOD, request: Request = REQUEST, config=CONFIG, blocks: int = 99 * 6) -> Record:
    return replace(record, uses=(estimate.use(request, config, blocks, ARCHS[record.arch]),))


def seconds(record: Record) -> float | None:
    return estimate.seconds(record, record.uses[0], ARCHS[record.arch])


def test_an_estimate_follows_the_compiled_code():
    base = seconds(used())
    loop = used(replace(GOOD, loop={"IADD3": 4000}))
    # 594 blocks on 132 multiprocessors are five on the fullest, of 8 warps, 48 steps each, four instructions a cycle.
    assert seconds(loop) == pytest.approx(5 * 8 * 48 * 4000 / 4 / ARCHS["sm_90"].clock) and seconds(loop) > base
    special = used(replace(GOOD, loop={"MUFU": 4000}))
    assert seconds(special) == pytest.approx(5 * 8 * 48 * 4000 * 32 / 16 / ARCHS["sm_90"].clock)
    assert seconds(used(replace(GOOD, loop={"FFMA": 4000}))) == pytest.approx(seconds(loop), rel=0.02)
    latency = used(replace(GOOD, blocks_per_sm=1), config=CONFIG._replace(num_stages=1), blocks=132 * 400)
    assert seconds(latency) == pytest.approx(400 * 48 * 480 / ARCHS["sm_90"].clock)
    assert seconds(used(replace(GOOD, blocks_per_sm=0))) is None and seconds(used(replace(GOOD, error="no"))) is None


@pytest.mark.parametrize(
    "kernel, config, steps",
    [
        ("attention_forward", AttentionConfig(64, 64, 4, 3), 4),
        ("layer_norm_forward", RowConfig(4, 1024, 4), 1),
        ("column_sum", RowConfig(32, 128, 4), 8),
    ],
)
def test_iterations_of_the_main_loop(kernel, config, steps):
    request = request_of(f"{kernel} {'64x197x12x64' if kernel.startswith('attention') else '12608x768'} bfloat16")
    blocks = {"attention_forward": 3072, "layer_norm_forward": 3152, "column_sum": 6 * 50}[kernel]
    assert estimate.use(request, config, blocks, ARCHS["sm_90"]).steps == steps


def test_a_configs_text_is_the_same_of_its_dictionary():
    fields = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "GROUP_M": 8, "SPLIT_K": 3}
    assert estimate.config_text(fields) == estimate.config_text(GemmConfig(**fields)) == "128x64x32 w4 s2 g8 k3"


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ([(1, 10), (2, 20), (3, 30)], 1.0),
        ([(1, 30), (2, 20), (3, 10)], -1.0),
        ([(1, 1), (2, 3), (3, 2), (4, 4)], 0.8),
        ([(1, 1), (1, 2), (2, 3)], 0.866),
        ([(1, 1), (2, 2)], None),
        ([(1, 1), (1, 2), (1, 3)], None),
    ],
)
def test_rank_correlation(pairs, expected):
    found = estimate.rank_correlation(pairs)
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def records():
    shapes = [(12608, 768, 768), (12608, 2304, 768), (12608, 768, 3072), (197, 768, 768)]
    made = [used(replace(GOOD, case=f"case {shape[1]}"), replace(REQUEST, shape=shape)) for shape in shapes]
    made.append(replace(used(replace(GOOD, spill_bytes=16), config=CONFIG._replace(BLOCK_N=256)), shipped=False))
    made.append(replace(FLAWED["serialized"], case="flawed"))
    return made


def write(folder: Path, records: list[Record], entries=(), results=Path("none"), others=()) -> str:
    """The page of sm_90, by way of the JSON files; others: (Triton, its records)."""
    folder.mkdir()
    runs = []
    for version, made in [("3.10.0", records), *others]:
        pages.save(folder / "json", pages.Run(version, "", made))
        runs.append(pages.load(folder / "json"))
    pages.write(folder, runs, entries, results)
    return (folder / "sm_90.md").read_text()


def test_pages_do_not_depend_on_the_order_of_compilation(tmp_path, records):
    write(tmp_path / "a", records)
    write(tmp_path / "b", records[::-1])
    names = ["README.md", "json", "sm_90.md"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        assert str(ROOT) not in text and str(tmp_path) not in text


def test_what_is_saved_is_loaded(tmp_path):
    record = replace(used(), loads_by_bits={128: 4, 16: 2}, loop={"HGMMA": 4, "LDG": 2}, rest={"EXIT": 1})
    pages.save(tmp_path / "new" / "run.json", pages.Run("3.6.0", "", [record]))
    assert pages.load(tmp_path / "new" / "run.json") == pages.Run("3.6.0", "", [record])


def test_a_page_says_what_failed_what_was_let_through_and_what_is_an_estimate(tmp_path, records):
    text = write(tmp_path / "a", records)
    assert "5 shipped kernels, 1 failures, 0 let through with a reason; 1 candidates of the tuner" in text
    assert "- **serialized**: `kernel`, flawed" in text and "- of the candidates: spill 1" in text
    assert "Each is an estimate from code and shape, not a measurement" in text
    assert "No kernel has been measured on sm_90 yet" in text
    found = json.loads((tmp_path / "a" / "json").read_text())["kernels"]
    shown = {
        (use["request"], use["config"]): estimated
        for row in found
        for use, estimated in zip(row["uses"], row["estimated_seconds"], strict=True)
    }
    assert len(shown) == 5 and shown[REQUEST.key, "128x128x64 w8 s3 g8 k1"] == pytest.approx(seconds(used()), rel=1e-3)

    text = write(tmp_path / "b", records, [Allowed("serialized", "It is planted here.", case="flawed")])
    assert "0 failures, 1 let through" in text and "let through. It is planted here. 1: `kernel`: flawed." in text
    row = "| 3.10.0 | [sm_90](sm_90.md) | 5 | 0 | 1 | 0 | 100 | 25% | 1 |"
    assert row in (tmp_path / "b" / "README.md").read_text()


def test_a_kernel_has_one_row_its_worst(tmp_path, records):
    spills = replace(GOOD, case="spills", spill_bytes=4)
    errs = replace(GOOD, kernel="other", case="errs", error="it raised")
    idle = replace(GOOD, case="idle", occupancy=0.125)
    rows = [line for line in write(tmp_path / "a", [*records, idle, spills]).splitlines() if "| kernel |" in line]
    assert len(rows) == 2 and rows[1].startswith("| kernel | 7 | spills |  | 100 | 4 |")
    rows = write(tmp_path / "b", [*records, errs, idle]).splitlines()
    first = rows.index("## Kernels, each in its worst case") + 4
    assert rows[first].startswith("| other | 1 | errs |  | ERROR it raised |")
    assert rows[first + 1].startswith("| kernel | 6 | idle |") and "| 12% (2x8 warps, registers) |" in rows[first + 1]


def test_a_page_says_what_differs_with_the_other_triton(tmp_path):
    serialized, spilling = FLAWED["serialized"], replace(GOOD, case="b", spill_bytes=4)
    newest = [serialized, replace(spilling, spill_bytes=0)]
    other = [replace(serialized, serialized=False), replace(spilling, occupancy=0.125)]
    entries = [Allowed(gate, "It is planted here.") for gate in ("serialized", "spill")]
    text = write(tmp_path / "a", newest, entries, others=[("3.9.0", other)])
    assert "by Triton 3.10.0" in text
    assert text.split("## With Triton 3.9.0 instead\n\n")[1].splitlines() == [
        "- spill, let through. It is planted here. 1: `kernel`: b.",
        "- no serialized: 1: `kernel`: case.",
        "- of 2 kernels (by name, case and config), 0 have a higher occupancy, 1 lower",
    ]
    assert "- **spill**: `kernel`, b, :" in write(tmp_path / "b", newest, others=[("3.9.0", other)])
    text = write(tmp_path / "c", newest, entries, others=[("3.9.0", newest)])
    same = "- of 2 kernels (by name, case and config), 0 have a higher occupancy, 0 lower"
    assert text.endswith(f"## With Triton 3.9.0 instead\n\n{same}\n")


def test_measured_kernels_stand_beside_their_estimates(tmp_path, records):
    folder = tmp_path / "results" / "nvidia-h100" / "abc"
    folder.mkdir(parents=True)
    config = {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 64,
        "num_warps": 8,
        "num_stages": 3,
        "GROUP_M": 8,
        "SPLIT_K": 1,
    }
    rows = [
        {"request": record.uses[0].request, "configs": [{"config": config, "seconds": factor * seconds(record)}]}
        for record, factor in zip(records[:4], (1.5, 1.2, 1.1, 2.0), strict=True)
    ]
    (folder / "micro.json").write_text(json.dumps({"finished": True, "arch": "sm_90", "launches": rows}))
    text = write(tmp_path / "pages", records, results=tmp_path / "results")
    line = "Against nvidia-h100/abc/micro.json: 4 kernels, Spearman's rank correlation 1.00 of estimate"
    assert line in text and "No kernel has been measured" not in text
    estimated, timed = (f"{scale * seconds(records[2]) * 1e6:.3g}" for scale in (1, 1.1))
    assert f"| {REQUEST.key} | 128x128x64 w8 s3 g8 k1 | {estimated} | {timed} |" in text
    assert estimate.measurements(tmp_path / "results", "sm_120") == {}


@pytest.mark.parametrize("content", ["", "[]", '{"arch": "sm_90", "launches": [{"request": "x"}]}', '{"launches": 3}'])
def test_a_damaged_file_of_measurements_is_named(tmp_path, content):
    path = tmp_path / "a" / "b" / "micro.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: no measured kernels"):
        estimate.measurements(tmp_path, "sm_90")


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "fastvit static report", "schema": 0}'])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "3.6.0.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: not a fastvit static report of schema 2"):
        pages.load(path)
    with pytest.raises(SystemExit):
        pages.main([str(tmp_path / "pages"), str(path)])
    assert not (tmp_path / "pages").exists()


def test_the_committed_pages_are_of_every_architecture():
    folder = ROOT / "docs" / "static"
    assert {path.name for path in folder.iterdir()} == {"README.md", *(f"{arch}.md" for arch in ARCHS)}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000
