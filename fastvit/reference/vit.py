"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929) as one function over a state dict."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import ops


def vision_transformer(
    images,
    state,
    *,
    num_heads,
    eps=1e-6,
    activation="gelu",
    mlp="mlp",
    global_pool="token",
    rope_temperature=None,
):
    """Logits of a ViT, DeiT or DINOv2, or of the image tower of CLIP or SigLIP, in evaluation mode.

    images (B, C, H, W), normalised, of the size the position table is for; state: a dict of tensors under timm's
    names, all of one dtype. num_heads: heads of every block; eps: of every LayerNorm; activation: a key of
    `ops.ACTIVATIONS`; mlp: "mlp", or "swiglu" for fc1 packed as [gate; value] (arXiv 2002.05202); global_pool: "token",
    "avg", "map" (arXiv 2303.15343) or "" (all tokens).
    rope_temperature: of DINOv3's rotary position embedding (arXiv 2508.10104), in place of pos_embed; None for none.
    Returns (B, num_classes), the mean of both heads for a distilled model (arXiv 2012.12877), or the pooled features
    (B, D), or the normalised tokens (B, T, D) for global_pool="", when the state holds no head.
    """
    # Equation 1: [class; distillation or registers; E x_p] + E_pos. A table without prefix rows skips the prefix.
    prefix = [state[name].flatten(0, 1) for name in ("cls_token", "dist_token", "reg_token") if name in state]
    x = ops.patch_embed(
        images,
        state["patch_embed.proj.weight"],
        state.get("patch_embed.proj.bias"),
        pos_embed=state["pos_embed"].flatten(0, 1) if "pos_embed" in state else None,
        prefix=torch.cat(prefix) if prefix else None,
    )
    if "norm_pre.weight" in state:
        x = ops.layer_norm(x, state["norm_pre.weight"], state["norm_pre.bias"], eps)

    rope = {}
    if rope_temperature is not None:
        patch = state["patch_embed.proj.weight"].shape[2:]
        height, width = images.shape[2] // patch[0], images.shape[3] // patch[1]
        rope = _rope(height, width, x.shape[-1] // num_heads, rope_temperature, x)

    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        # Equation 2: z' = MSA(LN(z)) + z.
        y = ops.layer_norm(x, block["norm1.weight"], block["norm1.bias"], eps)
        qkv = F.linear(y, block["attn.qkv.weight"], block.get("attn.qkv.bias"))
        y = ops.attention(qkv.unflatten(-1, (3, num_heads, -1)), **rope)
        y = F.linear(y, block["attn.proj.weight"], block["attn.proj.bias"])
        x = x + y * block.get("ls1.gamma", 1)
        # Equation 3: z'' = MLP(LN(z')) + z'.
        y = ops.layer_norm(x, block["norm2.weight"], block["norm2.bias"], eps)
        y = F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"])
        if mlp == "swiglu":
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate) * value
        else:
            y = ops.ACTIVATIONS[activation](y)
        y = F.linear(y, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
        x = x + y * block.get("ls2.gamma", 1)

    # Equation 4: y = LN(z_0), then the head; or the mean over the patch tokens in place of the class token.
    if "norm.weight" in state:
        x = ops.layer_norm(x, state["norm.weight"], state["norm.bias"], eps)
    if "head_dist.weight" in state:
        by_class = F.linear(x[:, 0], state["head.weight"], state["head.bias"])
        by_distillation = F.linear(x[:, 1], state["head_dist.weight"], state["head_dist.bias"])
        return (by_class + by_distillation) / 2
    if global_pool == "avg":
        x = x[:, len(torch.cat(prefix)) if prefix else 0 :].mean(dim=1)
    elif global_pool == "map":
        x = _attention_pool(x[:, len(torch.cat(prefix)) if prefix else 0 :], state, num_heads, eps, activation)
    elif global_pool == "token":
        x = x[:, 0]
    if "fc_norm.weight" in state:
        x = ops.layer_norm(x, state["fc_norm.weight"], state["fc_norm.bias"], eps)
    return F.linear(x, state["head.weight"], state["head.bias"]) if "head.weight" in state else x


def _rope(height, width, head_dim, temperature, like):
    """The angles of patch (i, j): 2 pi y / T and 2 pi x / T, where y = (2 i + 1) / height - 1 and
    x = (2 j + 1) / width - 1, for periods T = temperature^(4 k / head_dim), k from 0 to head_dim / 4 - 1."""
    k = torch.arange(head_dim // 4, dtype=like.dtype, device=like.device)
    frequency = 2 * torch.pi * temperature ** (-4 * k / head_dim)
    y, x = ((2 * torch.arange(n, dtype=like.dtype, device=like.device) + 1) / n - 1 for n in (height, width))
    by_row, by_column = (y[:, None] * frequency)[:, None], (x[:, None] * frequency)[None]
    grid = (height, width, head_dim // 4)
    angles = torch.cat([by_row.expand(grid), by_column.expand(grid)], dim=-1).flatten(0, 1)
    return {"rope_cos": angles.cos(), "rope_sin": angles.sin()}


def _attention_pool(x, state, num_heads, eps, activation):
    """Tokens x (B, N, D) -> (B, D): y = MSA of one learned query over all tokens, then y + MLP(LN(y))."""
    pool = {name.removeprefix("attn_pool."): t for name, t in state.items() if name.startswith("attn_pool.")}
    q = F.linear(pool["latent"], pool["q.weight"], pool["q.bias"]).unflatten(-1, (num_heads, -1))
    k, v = F.linear(x, pool["kv.weight"], pool["kv.bias"]).unflatten(-1, (2, num_heads, -1)).unbind(2)
    scores = torch.einsum("xqhd,bkhd->bhk", q, k) * q.shape[-1] ** -0.5
    y = torch.einsum("bhk,bkhd->bhd", scores.softmax(dim=-1), v).flatten(1)
    y = F.linear(y, pool["proj.weight"], pool["proj.bias"])
    z = ops.layer_norm(y, pool["norm.weight"], pool["norm.bias"], eps)
    z = F.linear(z, pool["mlp.fc1.weight"], pool["mlp.fc1.bias"])
    return y + F.linear(ops.ACTIVATIONS[activation](z), pool["mlp.fc2.weight"], pool["mlp.fc2.bias"])
