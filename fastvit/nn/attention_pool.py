"""Pooling by attention: one learned query over all tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .layers import build_layer_norm, check_input, check_positive, init_normal, refuse_scripting, traced, vit_layer_norm
from .mlp import Mlp


class AttentionPoolLatent(nn.Module):
    """The pool of SigLIP (arXiv 2303.15343) and big_vision: y = proj(attention of the latent to all tokens), then
    y + mlp(norm(y)). It has the names and numbers of timm's `AttentionPoolLatent` as timm's Vision Transformers build
    it, not that class's other options.

    Parameters: latent (1, 1, D), the query before its projection; q.*, kv.* (2 * D rows: keys, then values), proj.*,
    norm.*, mlp.fc1.*, mlp.fc2.*. All of it runs on PyTorch's own layers and SDPA: with one query a head and one row an
    image a kernel of ours has nothing to gain. Raises ValueError for sizes that are no positive integers and a
    num_heads that does not divide in_features.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_layer=vit_layer_norm,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_positive("in_features", in_features)
        check_positive("num_heads", num_heads)
        if in_features % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of in_features, {in_features}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, in_features, **dd))
        self.q = nn.Linear(in_features, in_features, **dd)
        self.kv = nn.Linear(in_features, 2 * in_features, **dd)
        self.proj = nn.Linear(in_features, in_features, **dd)
        self.norm = build_layer_norm(norm_layer, in_features, **dd)
        self.mlp = Mlp(in_features, int(in_features * mlp_ratio), act_layer=act_layer, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """The latent normal with variance 1 / D, cut at two standard deviations, as in timm."""
        with torch.no_grad():
            init_normal(self.latent, 1.0).mul_(self.latent.shape[-1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens x (B, N, D) -> (B, D)."""
        if not traced(x):
            check_input(x, self.latent.shape[-1])
        q = self.q(self.latent).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q.expand(x.shape[0], -1, -1, -1), k, v)
        y = self.proj(mixed.flatten(1))
        return y + self.mlp(self.norm(y))
