"""Facts of the machine that a launch depends on, read when first asked for."""

import torch
import triton


def has_wgmma() -> bool:
    """Whether products read their operands from shared memory (Hopper and data-center Blackwell) instead of passing
    them through the registers that the accumulator needs too."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and 90 <= target.arch < 120


def is_amd() -> bool:
    """Whether Triton's active driver compiles for an AMD GPU."""
    return triton.runtime.driver.active.get_current_target().backend == "hip"


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD) of `device`; an H100's 132 for a device that is no GPU, so that
    the interpreter and ahead-of-time compilation launch what an H100 would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
