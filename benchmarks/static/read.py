"""Reads registers, spills, memory and instructions off compiled code: cubins, AMD's assembly, PTX and Triton's IR."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from fastvit.kernels.launch.hardware import Arch

from .record import DOT_16, DOT_WIDE, NO_DOT

# Instructions of the tensor cores of Ampere and Ada, Hopper, Blackwell, and of CDNA's matrix cores.
TENSOR_CORE = re.compile(r"[HIQBDO]MMA|[HIQB]GMMA|UTC[A-Z]*MMA|v_s?mfmac?")


@dataclass(frozen=True)
class Code:
    """Every instruction's opcode, and the main loop's.

    The main loop is the innermost one with the most tensor-core instructions, else with the most instructions.
    """

    opcodes: list[str]
    start: int = 0
    end: int = 0

    @classmethod
    def with_loops(cls, opcodes: list[str], loops: list[tuple[int, int]], kind) -> Code:
        innermost = [
            (start, end)
            for start, end in loops
            if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
        ]

        def weight(loop: tuple[int, int]) -> tuple[int, int]:
            body = opcodes[slice(*loop)]
            return sum(TENSOR_CORE.fullmatch(kind(opcode)) is not None for opcode in body), len(body)

        return cls(opcodes, *max(innermost, key=weight, default=(0, 0)))

    @property
    def loop(self) -> list[str]:
        return self.opcodes[self.start : self.end]

    @property
    def rest(self) -> list[str]:
        return self.opcodes[: self.start] + self.opcodes[self.end :]


def nvidia(compiled, arch: Arch, log: str) -> dict:
    """The fields of a Record from a cubin and what ptxas said of it."""
    code = _disassemble(compiled.asm["cubin"])
    names = collections.Counter(map(_nvidia_kind, code.opcodes))
    # Warp specialisation adds warps to those of the launch's options.
    threads = _first_int(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"], compiled.metadata.num_warps * 32)
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    warps, shared = threads // 32, compiled.metadata.shared
    blocks_by = {
        # Registers are given out eight a thread at a time.
        "registers": arch.registers // (-(-registers // 8) * 8 * threads),
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
        "shared memory": arch.shared // (shared + 1024) if shared <= arch.shared_per_block else 0,
    }
    if tensor_memory := getattr(compiled.metadata, "tmem_size", None):
        blocks_by["tensor memory"] = 512 // tensor_memory
    return {
        **_occupancy(blocks_by, warps, arch),
        **_mixes(code, _nvidia_kind),
        "registers": registers,
        "spill_bytes": max(int(spill[1]), int(spill[2])) if spill else 0,
        "stack_bytes": _first_int(r"(\d+) bytes stack frame", log),
        "shared_bytes": shared,
        "serialized": "serialized" in log,
        "async_copies": names["LDGSTS"],
        "tma_loads": names["UTMALDG"],
        "tma_stores": names["UTMASTG"],
        "loads_by_bits": _by_bits(code.opcodes, _nvidia_bits, "LDG"),
        "stores_by_bits": _by_bits(code.opcodes, _nvidia_bits, "STG"),
        "loop_loads_by_bits": _by_bits(code.loop, _nvidia_bits, "LDG", "LDGSTS"),
        # The assembler may still have fused what PTX has apart: no more than it left.
        "missed_fusions": min(missed_fusions(compiled.asm["ptx"]), names["FADD"], names["FMUL"]),
    }


def amd(compiled, arch: Arch, log: str) -> dict:
    """The fields of a Record from AMD's assembly."""
    assembly, shared, warps = compiled.asm["amdgcn"], compiled.metadata.shared, compiled.metadata.num_warps
    blocks_by = {
        # A block's waves are spread over the four SIMDs.
        "registers": 4 * _first_int(r"; Occupancy: (\d+)", assembly) // warps,
        "warps": arch.warps // warps,
        "shared memory": (arch.shared // shared if shared else arch.blocks) if shared <= arch.shared else 0,
    }
    opcodes, loops, labels = [], [], {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s+([a-z]\w+)(?:\s+(\.LBB\w+))?", line):
            opcodes.append(instruction[1])
            if instruction[2] in labels:
                loops.append((labels[instruction[2]], len(opcodes)))
    code = Code.with_loops(opcodes, loops, _amd_kind)
    return {
        **_occupancy(blocks_by, warps, arch),
        **_mixes(code, _amd_kind),
        "registers": _first_int(r"\.vgpr_count:\s+(\d+)", assembly),
        "spill_bytes": 4 * _first_int(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "stack_bytes": _first_int(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "shared_bytes": shared,
        "loads_by_bits": _by_bits(opcodes, _amd_bits, "global_load", "buffer_load"),
        "stores_by_bits": _by_bits(opcodes, _amd_bits, "global_store", "buffer_store"),
        "loop_loads_by_bits": _by_bits(code.loop, _amd_bits, "global_load", "buffer_load"),
    }


def products(ttir: str) -> dict:
    """The fields of a Record that Triton's own IR tells: of the loop that holds the matrix products."""
    dots = re.findall(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x", ttir)
    if not dots:
        return {"dot": NO_DOT, "flops_per_byte": 0.0}
    flops = moved = 0
    depth = loop_depth = 0
    for line in ttir.splitlines():
        if "scf.for" in line and not loop_depth:
            loop_depth = depth + 1
        depth += line.count("{") - line.count("}")
        if loop_depth and depth < loop_depth:
            loop_depth = 0
        if not loop_depth:
            continue
        if dot := re.search(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", line):
            flops += 2 * int(dot[1]) * int(dot[2]) * int(dot[3])
        elif load := re.search(r"tt\.(?:descriptor_)?load .*tensor<(\d+)x(\d+)x(?:!tt\.ptr<)?[a-z]+(\d+)>", line):
            moved += int(load[1]) * int(load[2]) * int(load[3]) // 8
    kinds = {DOT_16 if kind in ("bf16", "f16") else DOT_WIDE for _, _, kind, _ in dots}
    return {
        "dot": DOT_16 if DOT_16 in kinds else DOT_WIDE,
        "flops_per_byte": round(flops / moved, 1) if moved else 0.0,
    }


_PTX = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.]+)\s+([^;]*);", re.MULTILINE)


def missed_fusions(ptx: str) -> int:
    """How many of a thread's multiplications have a result that only additions read, and are not fused with them.

    PTX names a value once, so that its readers are known. ptxas fuses a `mul.f32` with the `add.f32` that reads it; it
    cannot where a `selp` stands between (a `tl.where` around the product), nor where both carry a rounding (`.rn`, from
    `enable_fp_fusion=False`). A result that anything else reads as well (softmax's row maximum, a store) is needed by
    itself and does not count, nor do additions of other values, as softmax's sums.
    """
    readers: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    made: list[tuple[str, str]] = []
    for opcode, operands in _PTX.findall(ptx):
        first, *others = re.findall(r"%\w+", operands) or [""]
        made.append((first, opcode))
        # A store and the like reads its first operand too.
        reads = others if operands.lstrip().startswith("%") else [first, *others]
        for name in reads:
            readers[name].append((opcode, first))

    def only_added(name: str) -> bool:
        found = readers[name]
        return bool(found) and all(
            re.fullmatch(r"(add|sub)(\.\w+)*\.f32", opcode) or (opcode.startswith("selp") and only_added(result))
            for opcode, result in found
        )

    count = 0
    for name, opcode in made:
        if re.fullmatch(r"mul(\.\w+)*\.f32", opcode) and only_added(name):
            behind_select = all(reader.startswith("selp") for reader, _ in readers[name])
            count += behind_select or ".rn" in opcode
    return count


def _occupancy(blocks_by: dict[str, int], warps: int, arch: Arch) -> dict:
    limiter = min(blocks_by, key=blocks_by.get)
    blocks = blocks_by[limiter]
    return {"warps": warps, "blocks_per_sm": blocks, "occupancy": blocks * warps / arch.warps, "limiter": limiter}


def _mixes(code: Code, kind) -> dict:
    """Instructions by kind, in falling order, of the main loop and of the rest; those of tensor cores anywhere."""
    counts = [collections.Counter(map(kind, opcodes)) for opcodes in (code.loop, code.rest)]
    loop, rest = (dict(sorted(count.items(), key=lambda item: (-item[1], item[0]))) for count in counts)
    tensor_core = {
        name: count for name, count in sorted((counts[0] + counts[1]).items()) if TENSOR_CORE.fullmatch(name)
    }
    return {"loop": loop, "rest": rest, "tensor_core": tensor_core}


def _disassemble(cubin: bytes) -> Code:
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
    return Code.with_loops(opcodes, loops, _nvidia_kind)


def _nvidia_kind(opcode: str) -> str:
    return opcode.split(".")[0]


def _nvidia_bits(opcode: str) -> int:
    return _first_int(r"\.[US]?(8|16|64|128|256)\b", opcode, 32)


def _amd_kind(opcode: str) -> str:
    """What an instruction does, without its types and encoding: v_mfma, global_load, ds_read, v_mul."""
    return "_".join(opcode.split("_")[:2])


def _amd_bits(opcode: str) -> int:
    if dwords := re.search(r"dword(?:x(\d))?", opcode):
        return 32 * int(dwords[1] or 1)
    return 16 if "short" in opcode else 8


def _by_bits(opcodes: list[str], bits, *kinds: str) -> dict[int, int]:
    """How many instructions of some kinds move how many bits a thread, the widest first."""
    of_kind = (opcode for opcode in opcodes if _nvidia_kind(opcode) in kinds or _amd_kind(opcode) in kinds)
    return dict(sorted(collections.Counter(map(bits, of_kind)).items(), reverse=True))


def _first_int(pattern: str, text: str, default: int = 0) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else default
