"""fastvit's own model, frozen: on PyTorch alone, on another runtime, or on the fastest that is installed."""

from __future__ import annotations

import fastvit

from . import Built


def build(peer, case, ours, inputs) -> Built:
    runtime = {"frozen": "torch", "frozen auto": "auto"}.get(peer.name, peer.name.removeprefix("frozen "))
    frozen = fastvit.freeze(ours, runtime=runtime, batch_sizes=(case.batch,))
    note = f"on {frozen.runtime}" if runtime == "auto" else ""
    return Built(frozen, note, opaque=frozen.runtime == "triton")  # which replays CUDA graphs of its own
