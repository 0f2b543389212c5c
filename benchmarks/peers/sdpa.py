"""PyTorch's scaled_dot_product_attention, pinned to one of its back ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import Built
from ._common import check_known

_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def unfit(peer, case, config, device) -> str | None:
    if peer.name == "sdpa flash" and device.type == "cuda" and case.dtype == torch.float32:
        return "has no kernel for float32 on a GPU"
    return None


def build(peer, case, ours, inputs) -> Built:
    check_known(peer.name, inputs, "qkv", "scale")
    backend = _BACKENDS[peer.name]

    def call(qkv, scale=None, **absent):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).flatten(2)

    return Built(call)
