"""xformers' memory_efficient_attention, which picks its own kernel. Written from its documented signature and tested
against a stand-in that has it: never run with the package, which needs a GPU."""

from __future__ import annotations

from . import Built
from ._common import check_known


def build(peer, case, ours, inputs) -> Built:
    from xformers.ops import memory_efficient_attention

    check_known(peer.name, inputs, "qkv", "scale")

    def call(qkv, scale=None, **absent):
        q, k, v = qkv.unbind(2)  # each (B, N, H, d)
        return memory_efficient_attention(q, k, v, scale=scale).flatten(2)

    return Built(call)
