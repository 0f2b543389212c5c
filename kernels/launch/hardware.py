"""Facts of the machine that a launch depends on: of the device at hand, read when first asked for, and of the
architectures, from the vendors' documents, for what is decided where there is no device."""

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Arch:
    """One architecture: what bounds a kernel on a multiprocessor ("SM"; a compute unit on AMD), and what a well-known
    GPU of that kind reaches by its data sheet.

    warps, blocks: resident at most on an SM; registers: 32-bit ones of an SM (on AMD, vector registers a lane of each
    of four SIMDs); shared, shared_per_block: bytes of shared memory an SM has, and a block may have at most. gpu: whose
    figures the rest are: sms; clock, Hz under load; flops_16, flops_32: dense 16-bit matrix and plain float32 FLOP/s;
    bandwidth: bytes/s of device memory; l2: bytes.
    """

    name: str
    backend: str
    capability: int | str
    warp_size: int
    warps: int
    blocks: int
    registers: int
    shared: int
    shared_per_block: int
    gpu: str
    sms: int
    clock: float
    flops_16: float
    flops_32: float
    bandwidth: float
    l2: int

    @property
    def has_wgmma(self) -> bool:
        """Whether products read their operands from shared memory (Hopper and data-center Blackwell) instead of
        passing them through the registers that the accumulator needs too."""
        return self.backend == "cuda" and 90 <= self.capability < 120

    @property
    def has_tma(self) -> bool:
        """Whether the persistent loop over tiles that TMA loads is there for it: tried on Hopper."""
        return self.name == "sm_90"


def _nvidia(capability: int, warps: int, blocks: int, shared: int, *gpu) -> Arch:
    # The driver keeps 1 KiB of shared memory a block for itself.
    return Arch(
        f"sm_{capability}", "cuda", capability, 32, warps, blocks, 65536, shared << 10, (shared - 1) << 10, *gpu
    )


ARCHS = {
    arch.name: arch
    for arch in (
        _nvidia(80, 64, 32, 164, "A100 SXM 80 GB", 108, 1.41e9, 312e12, 19.5e12, 2.04e12, 40 << 20),
        _nvidia(89, 48, 24, 100, "L40S", 142, 2.52e9, 362e12, 91.6e12, 0.864e12, 96 << 20),
        _nvidia(90, 64, 32, 228, "H100 SXM", 132, 1.83e9, 989e12, 67e12, 3.35e12, 50 << 20),
        _nvidia(100, 64, 32, 228, "B200", 148, 1.85e9, 2250e12, 75e12, 8.0e12, 126 << 20),
        _nvidia(120, 48, 24, 100, "GeForce RTX 5090", 170, 2.41e9, 209.5e12, 104.8e12, 1.79e12, 96 << 20),
        # A compute unit: four SIMDs of eight waves each, and 512 vector registers a lane of each.
        Arch("gfx942", "hip", "gfx942", 64, 32, 32, 512, 64 << 10, 64 << 10, "MI300X",
             304, 2.1e9, 1307e12, 163.4e12, 5.3e12, 4 << 20),
    )
}  # fmt: skip


def current_arch() -> Arch:
    """The architecture that Triton's active driver compiles for: of one not in ARCHS, the nearest older NVIDIA one, or
    gfx942."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return ARCHS["gfx942"]
    known = [arch for arch in ARCHS.values() if arch.backend == "cuda" and arch.capability <= target.arch]
    return max(known, key=lambda arch: arch.capability, default=ARCHS["sm_80"])


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD) of `device`; an H100's for a device that is no GPU, so that the
    interpreter and ahead-of-time compilation launch what an H100 would."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return ARCHS["sm_90"].sms
