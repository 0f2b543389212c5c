"""fastvit's attention as one of transformers' implementations."""

from __future__ import annotations

import torch
from torch import nn

from fastvit import ops
from fastvit.nn.attention import masks

from .layouts import asks_for_more
from .plans import may_run


def register_attention(name: str = "fastvit") -> None:
    """Register `ops.attention` with transformers under `name`, for `from_pretrained(..., attn_implementation=name)` and
    `model.set_attn_implementation(name)`, of any model of theirs that goes by their AttentionInterface.

    What the op does not do (dropout, causal attention, fewer heads of keys than of queries, a cache) runs as "sdpa".
    Raises ImportError where transformers is not installed, or has no AttentionMaskInterface (before 4.53).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others,
    ) -> tuple[torch.Tensor, None]:
        """query, key, value (B, H, N, d) -> (B, N, H, d)."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if (
            not may_run(query)
            or not query.shape == key.shape == value.shape
            or dropout
            or (causal and attention_mask is None)
            or asks_for_more(others)
        ):
            how = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **how, **others)
        batch, heads, tokens, _ = query.shape
        key_padding_mask, attn_bias = masks(attention_mask, False, batch, heads, tokens, query)
        qkv = torch.stack([tensor.transpose(1, 2) for tensor in (query, key, value)], dim=2)
        out = ops.attention(qkv, scale=scaling, key_padding_mask=key_padding_mask, attn_bias=attn_bias)
        return out.unflatten(2, (heads, -1)), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
