"""The flash-attn package. Written from its documented signature and tested against a stand-in that has it: the package
needs a GPU to be installed, and this was never run with it."""

from __future__ import annotations

from . import Built
from ._common import check_known


def build(peer, case, ours, inputs) -> Built:
    from flash_attn import flash_attn_qkvpacked_func

    check_known(peer.name, inputs, "qkv", "scale")
    note = "gradients summed by atomics, in no fixed order" if case.mode == "training" else ""

    def call(qkv, scale=None, **absent):
        return flash_attn_qkvpacked_func(qkv, softmax_scale=scale).flatten(2)  # (B, N, H, d) before

    return Built(call, note)
