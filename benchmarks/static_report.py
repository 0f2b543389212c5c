"""Compiles every kernel for GPUs that are not here, and reads registers, spills, memory and instructions off the code.

    python benchmarks/static_report.py [--arch sm_90 ...] [--match TEXT] [--json FILE]

A case is a label and a function without arguments that calls a launcher on meta tensors. Its launches are caught and
compiled, never run, with the very specialisation that Triton derives for them; equal launches count once. The exit
status is 1 when a kernel fails `gate`. A static figure is evidence about the code, never a speed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

Case = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Arch:
    """What bounds a kernel on one architecture; shared memory in bytes, of a multiprocessor and at most of a block."""

    target: GPUTarget
    warps: int
    blocks: int
    registers: int
    shared: int
    shared_per_block: int


def _nvidia(capability: int, warps: int, blocks: int, shared: int) -> Arch:
    # The driver keeps 1 KiB of shared memory a block for itself.
    return Arch(GPUTarget("cuda", capability, 32), warps, blocks, 65536, shared, shared - 1024)


ARCHS = {
    "sm_80": _nvidia(80, 64, 32, 164 * 1024),
    "sm_89": _nvidia(89, 48, 24, 100 * 1024),
    "sm_90": _nvidia(90, 64, 32, 228 * 1024),
    "sm_100": _nvidia(100, 64, 32, 228 * 1024),
    "sm_120": _nvidia(120, 48, 24, 100 * 1024),
    # A compute unit: four SIMDs of eight waves each, and 512 vector registers a lane of each.
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 32, 32, 512, 64 * 1024, 64 * 1024),
}

# Instructions of the tensor cores of Ampere and Ada, Hopper, and Blackwell.
TENSOR_CORE = re.compile(r"[HIQBDO]MMA|[HIQB]GMMA|UTC[A-Z]*MMA")


@dataclass(frozen=True)
class Record:
    """One kernel in one specialisation, compiled for one architecture. `error` is empty unless that failed."""

    arch: str
    case: str
    kernel: str
    config: str
    error: str = ""
    warps: int = 0
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    limiter: str = ""
    serialized: bool = False
    has_16_bit_dot: bool = False
    tensor_core: dict[str, int] = field(default_factory=dict)
    async_copies: int = 0
    tma_loads: int = 0
    tma_stores: int = 0
    loads_by_bits: dict[int, int] = field(default_factory=dict)
    stores_by_bits: dict[int, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)


def gate(record: Record, arch: str) -> list[str]:
    """Why the kernel must not ship for `arch`; empty if it may."""
    if record.error:
        return [f"does not compile: {record.error}"]
    failures = []
    if record.spill_bytes:
        failures.append(f"spills {record.spill_bytes} bytes of registers")
    limit = ARCHS[arch].shared_per_block
    if record.shared_bytes > limit:
        failures.append(f"needs {record.shared_bytes} bytes of shared memory, {arch} has {limit}")
    if record.serialized:
        failures.append("its warpgroup matrix instructions are serialized")
    if arch == "sm_90" and record.has_16_bit_dot and not record.tensor_core.get("HGMMA"):
        failures.append("multiplies 16-bit matrices without HGMMA")
    return failures


@dataclass(frozen=True)
class _Launch:
    arch: str
    case: str
    kernel: JITFunction | None
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    error: str = ""


class _AbsentDriver:
    """Answers for the GPU of an architecture as far as specialising and compiling a kernel asks."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return ARCHS[self._arch].target

    def get_current_device(self) -> str:
        # Kernels are cached by device: each architecture gets a cache of its own.
        return self._arch

    def get_current_stream(self, device=None) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(arch: str, run=JITFunction.run) -> Iterator[None]:
    """Have launches compile for `arch`, through `run` in place of Triton's own method."""
    config, original = triton.runtime.driver, JITFunction.run
    before = config._active
    config.set_active(_AbsentDriver(arch))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original
        config._active = before


def launches(cases: Iterable[Case], arch: str) -> list[_Launch]:
    """What the cases launch on `arch`, each kernel once per specialisation; a case that raises gives an error."""
    found: dict[object, _Launch] = {}

    def catch(kernel, *args, grid, warmup, **kwargs):
        binder = kernel.device_caches[arch][-1]
        _, specialization, options = binder(*args, **kwargs)
        found.setdefault((kernel, str(specialization), str(options)), _Launch(arch, label, kernel, args, kwargs))

    with _compiling_for(arch, catch):
        for label, call in cases:
            try:
                call()
            except Exception as error:
                found[label] = _Launch(arch, label, None, error=_one_line(error))
    return list(found.values())


def compile_launch(launch: _Launch) -> Record:
    """Compile one caught launch and read the result."""
    name = launch.kernel.fn.__name__ if launch.kernel else "(launcher)"
    about = {"arch": launch.arch, "case": launch.case, "kernel": name, "config": _config(launch.kwargs)}
    if launch.error:
        return Record(**about, error=launch.error)
    log = io.StringIO()
    with _compiling_for(launch.arch), triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        # Triton prints what ptxas said, but only of a kernel that it does not find in its cache.
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        try:
            with contextlib.redirect_stdout(log):
                compiled = launch.kernel.run(*launch.args, grid=None, warmup=True, **launch.kwargs)
        except Exception as error:
            return Record(**about, error=_one_line(error))
    read = _read_nvidia if ARCHS[launch.arch].target.backend == "cuda" else _read_amd
    dots = re.search(r"tt\.dot .*: tensor<[\dx]+x(?:bf16|f16)>", compiled.asm["ttir"])
    return Record(**about, has_16_bit_dot=dots is not None, **read(compiled, launch.arch, log.getvalue()))


def report(
    cases: Iterable[Case], archs: Iterable[str], progress: Callable[[str], None] = lambda line: None
) -> list[Record]:
    """A record of every distinct launch of the cases on every architecture, in the order of the cases."""
    # Unset, the newest Triton warns that its default will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    cases = list(cases)
    found = [launch for arch in archs for launch in launches(cases, arch)]
    records = []
    # Forked, the workers know the launches already: functions and modules of the cases need not be pickled.
    with (
        _forked_with(found),
        ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as pool,
    ):
        for record in pool.map(_compile_forked, range(len(found))):
            records.append(record)
            progress(f"{len(records)}/{len(found)} {record.arch} {record.case}: {record.kernel}")
    return records


_forked_launches: list[_Launch] = []


@contextlib.contextmanager
def _forked_with(found: list[_Launch]) -> Iterator[None]:
    _forked_launches[:] = found
    try:
        yield
    finally:
        _forked_launches.clear()


def _compile_forked(index: int) -> Record:
    return compile_launch(_forked_launches[index])


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _config(kwargs: dict) -> str:
    """The sizes and options of a launch; the rest follows from the case."""
    return " ".join(f"{name}={value}" for name, value in kwargs.items() if isinstance(value, int))


def _first_int(pattern: str, text: str, default: int = 0) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else default


def _read_nvidia(compiled, arch: str, log: str) -> dict:
    instructions, loop = _disassemble(compiled.asm["cubin"])
    names = collections.Counter(opcode.split(".")[0] for opcode in instructions)
    # Warp specialisation adds warps to those of the launch's options.
    threads = _first_int(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"], compiled.metadata.num_warps * 32)
    registers = _first_int(r"Used (\d+) registers", log)
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    limits = ARCHS[arch]
    warps, shared = threads // 32, compiled.metadata.shared
    blocks_by = {
        # Registers are given out eight a thread at a time.
        "registers": limits.registers // (-(-registers // 8) * 8 * threads),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "shared memory": limits.shared // (shared + 1024) if shared <= limits.shared_per_block else 0,
    }
    if tensor_memory := getattr(compiled.metadata, "tmem_size", None):
        blocks_by["tensor memory"] = 512 // tensor_memory
    limiter = min(blocks_by, key=blocks_by.get)
    return {
        "warps": warps,
        "registers": registers,
        "spill_bytes": max(int(spill[1]), int(spill[2])) if spill else 0,
        "stack_bytes": _first_int(r"(\d+) bytes stack frame", log),
        "shared_bytes": shared,
        "blocks_per_sm": blocks_by[limiter],
        "occupancy": blocks_by[limiter] * warps / limits.warps,
        "limiter": limiter,
        "serialized": "serialized" in log,
        "tensor_core": {name: count for name, count in sorted(names.items()) if TENSOR_CORE.fullmatch(name)},
        "async_copies": names["LDGSTS"],
        "tma_loads": names["UTMALDG"],
        "tma_stores": names["UTMASTG"],
        "loads_by_bits": _by_bits(instructions, "LDG"),
        "stores_by_bits": _by_bits(instructions, "STG"),
        "loop": dict(loop.most_common()),
    }


def _disassemble(cubin: bytes) -> tuple[list[str], collections.Counter]:
    """Every instruction's opcode, and how many of each kind the main loop holds.

    The main loop is the innermost one with the most tensor-core instructions, else with the most instructions.
    """
    nvdisasm = triton.knobs.nvidia.nvdisasm.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without its data-flow analysis, which nothing here reads, it takes half the time.
        text = subprocess.run([nvdisasm, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            opcodes.append(instruction[1])
            branch = re.search(r"`\((\.L_x_\d+)\)", line)
            # A kernel ends with a branch to itself, which is no loop.
            if branch and instruction[1].startswith("BRA") and labels.get(branch[1], len(opcodes)) < len(opcodes) - 1:
                loops.append((labels[branch[1]], len(opcodes)))
    kinds = [opcode.split(".")[0] for opcode in opcodes]
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    bodies = [kinds[start:end] for start, end in innermost]
    main = max(bodies, key=lambda body: (sum(map(bool, map(TENSOR_CORE.fullmatch, body))), len(body)), default=[])
    return opcodes, collections.Counter(main)


def _by_bits(opcodes: list[str], kind: str) -> dict[int, int]:
    """How many instructions of a kind move how many bits a thread."""
    widths = collections.Counter(
        _first_int(r"\.[US]?(8|16|64|128)\b", opcode, 32) for opcode in opcodes if opcode.split(".")[0] == kind
    )
    return dict(sorted(widths.items(), reverse=True))


def _read_amd(compiled, arch: str, log: str) -> dict:
    assembly, shared, warps = compiled.asm["amdgcn"], compiled.metadata.shared, compiled.metadata.num_warps
    limits = ARCHS[arch]
    registers = _first_int(r"\.vgpr_count:\s+(\d+)", assembly)
    blocks_by = {
        # A block's waves are spread over the four SIMDs.
        "registers": 4 * _first_int(r"; Occupancy: (\d+)", assembly) // warps,
        "warps": limits.warps // warps,
        "shared memory": (limits.shared // shared if shared else limits.blocks) if shared <= limits.shared else 0,
    }
    limiter = min(blocks_by, key=blocks_by.get)
    matrix = collections.Counter(re.findall(r"\bv_(s?mfmac?)_", assembly))
    bits = {"ubyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}

    def by_bits(action: str) -> dict[int, int]:
        kinds = re.findall(rf"\b(?:global|buffer)_{action}_(u?byte|u?short|dword(?:x\d)?)\b", assembly)
        return dict(sorted(collections.Counter(bits[kind] for kind in kinds).items(), reverse=True))

    return {
        "warps": warps,
        "registers": registers,
        "spill_bytes": 4 * _first_int(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "stack_bytes": _first_int(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "shared_bytes": shared,
        "blocks_per_sm": blocks_by[limiter],
        "occupancy": blocks_by[limiter] * warps / limits.warps,
        "limiter": limiter,
        "tensor_core": {name.upper(): count for name, count in sorted(matrix.items())},
        "loads_by_bits": by_bits("load"),
        "stores_by_bits": by_bits("store"),
    }


def _counts(counter: dict) -> str:
    return " ".join(f"{name}:{count}" for name, count in counter.items()) or "-"


def table(records: list[Record]) -> str:
    """The records as text, one line each, its main loop's mix below it."""
    lines = []
    heading = f"registers spill stack shared  {'occupancy':33} tensor cores; copies; loads; stores by bits"
    for record in records:
        key = f"{record.arch} {record.kernel}"
        if not lines:
            lines.append(f"{'':40} {heading}")
        lines.append(f"{key:40}" + ("" if not record.error else f" ERROR {record.error}"))
        if not record.error:
            occupancy = f"{record.blocks_per_sm}x{record.warps} warps, {record.occupancy:.0%}, {record.limiter}"
            copies = f"cp.async:{record.async_copies} " if record.async_copies else ""
            copies += f"TMA:{record.tma_loads}/{record.tma_stores} " if record.tma_loads or record.tma_stores else ""
            lines[-1] += (
                f" {record.registers:9} {record.spill_bytes:5} {record.stack_bytes:5} {record.shared_bytes:6}  "
                f"{occupancy:33} {_counts(record.tensor_core)}; {copies.strip() or '-'}; "
                f"{_counts(record.loads_by_bits)}; {_counts(record.stores_by_bits)}"
            )
        lines.append(f"    {record.case}; {record.config}")
        if record.loop:
            top = dict(list(record.loop.items())[:9])
            lines.append(f"    loop of {sum(record.loop.values())}: {_counts(top)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="static_report.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS), metavar="ARCH", help=", ".join(ARCHS)
    )
    parser.add_argument("--match", default="", metavar="TEXT", help="only the cases whose label holds TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to FILE as well")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled")

    cases = importlib.import_module("fastvit.benchmarks.static_cases").cases()
    chosen = [case for case in cases if options.match in case[0]]
    if not chosen:
        parser.error(f"no case's label holds {options.match!r}")

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    records = report(chosen, options.arch, progress)
    progress("")
    print(f"Triton {triton.__version__}, torch {torch.__version__}\n{table(records)}")
    failures = [(record, reason) for record in records for reason in gate(record, record.arch)]
    for record, reason in failures:
        print(f"FAILED {record.arch} {record.kernel} ({record.case}; {record.config}): {reason}")
    print(f"{len(records)} kernels, {len(failures)} failures")
    if options.json:
        options.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
