"""How long a launch might take, from its code and its shape; and the measurements that such estimates are held against.

An estimate is the greatest of

- what kernels/launch/cost.py says of the request and config: products at the share of the data sheet's rate that tiles
  of that size and depth reach, padding and the last, partial wave included; bytes of device memory;
- the cycles that one multiprocessor needs to issue all instructions of its blocks, by the compiled code's mix: in all,
  those of the FP32 lanes and those of the special functions apart;
- the latency of one load each iteration of the main loop, beyond what its stages prefetch, for as many rounds as the
  blocks that are resident together (by registers and shared memory as compiled) leave.

Caches, clocks, bank conflicts and dependencies are not in it.

A measured kernel comes from `benchmarks/results/*/*/micro.json`:

    {"arch": "sm_90",
     "launches": [{"request": Request.key, "configs": [{"config": {field: value, ...}, "seconds": 1.2e-4}, ...]}, ...]}

with the config's dataclass as a dictionary and the seconds of one launch, its median. Other keys are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastvit.kernels.launch import cost
from fastvit.kernels.launch.hardware import Arch
from fastvit.kernels.launch.request import Config, GemmConfig, Request, TmaConfig, ceil_div, tiling

from .record import Record, Use

# Instructions of a warp that an SM starts in a cycle (of a 64-wide wave, on a compute unit of four 16-wide SIMDs), and
# how many threads' special functions it starts.
ISSUE = {"cuda": 4, "hip": 1}
SPECIAL = 16
_FLOAT_32 = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2")


def use(request: Request, config: Config, blocks: int, arch: Arch) -> Use:
    """A launch of `blocks` programs as a Record keeps it."""
    if isinstance(config, (GemmConfig, TmaConfig)):
        steps = ceil_div(ceil_div(request.shape[2], config.SPLIT_K), config.BLOCK_K)
    elif request.kernel.startswith("attention"):
        steps = tiling(request, config).steps
    else:
        tiles = ceil_div(request.shape[0], config.BLOCK_ROWS) * ceil_div(request.shape[1], config.BLOCK_D)
        steps = ceil_div(tiles, blocks)
    return Use(request.key, config_text(config), blocks, steps, cost.request_seconds(request, config, arch))


def config_text(config: Config | Mapping[str, int]) -> str:
    """A config in a few characters: 128x128x64 w8 s3 g8 k1 is tiles, warps, stages, GROUP_M and SPLIT_K;
    p2 is SUBTILES, t4 ROW_TILES."""
    values = config if isinstance(config, Mapping) else config._asdict()
    blocks = "x".join(str(value) for name, value in values.items() if name.startswith("BLOCK"))
    letters = {"num_warps": "w", "num_stages": "s", "GROUP_M": "g", "SPLIT_K": "k", "SUBTILES": "p", "ROW_TILES": "t"}
    return " ".join([blocks, *(f"{letter}{values[name]}" for name, letter in letters.items() if name in values)])


def seconds(record: Record, use: Use, arch: Arch) -> float | None:
    """The estimate for one use of a compiled kernel; None where it cannot run."""
    if record.error or not record.blocks_per_sm or use.base_seconds is None:
        return None
    blocks = ceil_div(use.blocks, arch.sms)
    cycles = _cycles(record.rest, arch) + use.steps * _cycles(record.loop, arch)
    stages = int(next((part[1:] for part in use.config.split() if part.startswith("s")), 1))
    rounds = ceil_div(blocks, record.blocks_per_sm)
    latency = rounds * use.steps * cost.LATENCY_CYCLES / max(1, stages - 1)
    return max(use.base_seconds, max(blocks * record.warps * cycles, latency) / arch.clock)


def _cycles(mix: Mapping[str, int], arch: Arch) -> float:
    """Of an SM, for one warp's instructions."""
    lanes = arch.flops_32 / (2 * arch.sms * arch.clock)
    return max(
        sum(mix.values()) / ISSUE[arch.backend],
        sum(mix.get(kind, 0) for kind in _FLOAT_32) * arch.warp_size / lanes,
        mix.get("MUFU", 0) * arch.warp_size / SPECIAL,
    )


def measurements(results: Path, arch: str) -> dict[str, dict[tuple[str, str], float]]:
    """{file: {(request, config): seconds}} of the kernels measured on `arch`, of every micro.json under `results`.

    Raises ValueError, naming the file, for one that is not in the form that this module's head gives.
    """
    found = {}
    for path in sorted(results.glob("*/*/micro.json")):
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            times = {
                (row["request"], config_text(measured["config"])): float(measured["seconds"])
                for row in written["launches"]
                if written["arch"] == arch
                for measured in row["configs"]
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no measured kernels ({type(error).__name__}: {error})") from None
        if times:
            found[path.relative_to(results).as_posix()] = times
    return found


def rank_correlation(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Spearman's, ties at their mean rank; None of fewer than three pairs, or where one side is all the same."""
    pairs = list(pairs)
    if len(pairs) < 3:
        return None
    left, right = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    mean = (len(pairs) + 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(left, right, strict=True))
    spread = [sum((rank - mean) ** 2 for rank in ranks) for ranks in (left, right)]
    return covariance / (spread[0] * spread[1]) ** 0.5 if all(spread) else None


def _ranks(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
