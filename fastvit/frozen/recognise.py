"""Which models can be frozen: the one place that looks into their modules. It writes the plan of what they do, module
for module, before any rewrite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastvit.models.patches import PatchDropout
from fastvit.models.vision_transformer import VisionTransformer
from fastvit.nn import Attention, AttentionPoolLatent, Block, PatchEmbed
from fastvit.nn.layers import (
    DROP_PATH,
    DROPOUT,
    FUSED_ACTIVATION,
    LAYER_NORM,
    LAYER_SCALE,
    LINEAR,
    activation_name,
)
from fastvit.nn.mlp import Mlp, SwiGLU

from .from_others import as_ours as other_as_ours
from .plan import IMAGES, ROPE, Plan, Step
from .serving import check_serves

OUTPUTS = ("logits", "features", "tokens")


def our_model(model: nn.Module) -> VisionTransformer:
    """The model as ours, its tensors shared: itself, or another library's loaded into ours. Raises TypeError for what
    is no Vision Transformer that is known, ValueError for one that does what ours has not."""
    if isinstance(model, VisionTransformer):
        return model
    found = None
    if type(model).__module__.startswith("timm."):
        from .from_timm import as_ours  # timm is there

        found = as_ours(model)
    if found is None and isinstance(model, nn.Module):
        found = other_as_ours(model)
    if found is None:
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__name__}, expected a fastvit.VisionTransformer, or one "
            "of timm, torchvision or transformers that is known: docs/drop-in.md"
        )
    return found


def plan_of(model: VisionTransformer, outputs: Iterable[str]) -> Plan:
    """What `model` computes in evaluation, one step a module.

    outputs: of OUTPUTS; "logits" are what `model(images)` gives, "features" `forward_head(..., pre_logits=True)`,
    "tokens" `forward_features`. Raises ValueError for a model in training mode, with active dropout, with hooks, or
    with modules that a plan has no step for.
    """
    _check(model)
    plan = _Writer()
    config = model.config
    proj = model.patch_embed.proj
    images = plan.step("pixels", "normalise", IMAGES, mean=config.mean, std=config.std)
    pad = {"pad": True} if config.dynamic_img_pad else {}
    patches = plan.step("patches", "patch_embed", images, plan.weights("patch_embed.proj", proj), **pad)
    prefix = model._prefix()
    positions = None if model.pos_embed is None else model.pos_embed[0]
    tables = plan.constants(positions=("pos_embed", positions), prefix=("prefix", prefix))
    rope = model._rope(model.patch_embed.proj.weight.new_empty(1, config.in_chans, *config.img_size))
    angles = {} if rope is None else plan.constants(cos=(ROPE[0], rope[0]), sin=(ROPE[1], rope[1]))
    rows = {"prefix_rows": model._prefix_rows, "prefix_tokens": config.num_prefix_tokens}
    x = plan.step("tokens", "assemble", patches, tables, **rows)
    x = plan.norm("norm_pre", model.norm_pre, x)
    for i, block in enumerate(model.blocks):
        x = _block(plan, f"blocks.{i}", block, x, angles, config.num_prefix_tokens)
    tokens = plan.norm("norm", model.norm, x)
    features = logits = None
    if config.distilled:
        both = [
            plan.step(f"row{i}", "flatten", plan.step(f"rows{i}", "rows", tokens, start=i, stop=i + 1)) for i in (0, 1)
        ]
        heads = (("head", model.head), ("head_dist", model.head_dist))
        features = plan.step("features", "mean", both)
        logits = plan.step(
            "logits", "mean", [plan.linear(name, head, x) for (name, head), x in zip(heads, both, strict=True)]
        )
    else:
        x, pool = tokens, config.global_pool
        if pool == "token":
            x = plan.step("pooled", "flatten", plan.step("class_token", "rows", tokens, start=0, stop=1))
        elif pool:
            if config.num_prefix_tokens:
                x = plan.step("patch_tokens", "rows", x, start=config.num_prefix_tokens, stop=None)
            if pool == "map":
                x = _attention_pool(plan, model.attn_pool, x)
            else:
                x = plan.step("pooled", "pool", x, kind=pool)
        features = plan.norm("fc_norm", model.fc_norm, x)
        logits = plan.linear("head", model.head, features)
    values = {"logits": logits, "features": features, "tokens": tokens}
    return Plan(tuple(plan.steps), {name: values[name] for name in outputs}, plan.tensors, config)


class _Writer:
    """Steps and constants as they are written."""

    def __init__(self):
        self.steps: list[Step] = []
        self.tensors: dict[str, torch.Tensor] = {}

    def constants(self, **named: tuple[str, torch.Tensor | None]) -> dict[str, str]:
        """role=(name, tensor) of those that are there, kept."""
        there = {role: (name, tensor.detach()) for role, (name, tensor) in named.items() if tensor is not None}
        self.tensors |= dict(there.values())
        return {role: name for role, (name, _) in there.items()}

    def weights(self, name: str, module: nn.Module) -> dict[str, str]:
        return self.constants(weight=(f"{name}.weight", module.weight), bias=(f"{name}.bias", module.bias))

    def step(self, out: str, op: str, inputs: str | Iterable[str], constants=None, **options) -> str:
        inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        self.steps.append(Step(out, op, inputs, constants or {}, options))
        return out

    def linear(self, name: str, module: nn.Module, x: str) -> str:
        return x if isinstance(module, nn.Identity) else self.step(name, "linear", x, self.weights(name, module))

    def norm(self, name: str, module: nn.Module, x: str) -> str:
        if isinstance(module, nn.Identity):
            return x
        return self.step(name, "layer_norm", x, self.weights(name, module), eps=module.eps)

    def scale(self, name: str, module: nn.Module, x: str) -> str:
        if isinstance(module, nn.Identity):
            return x
        return self.step(name, "scale", x, self.constants(gamma=(f"{name}.gamma", module.gamma)))


def _block(plan: _Writer, name: str, block: Block, x: str, angles: dict[str, str], prefix_tokens: int) -> str:
    attn, mlp = block.attn, block.mlp
    y = plan.norm(f"{name}.norm1", block.norm1, x)
    y = plan.linear(f"{name}.attn.qkv", attn.qkv, y)
    if angles:
        y = plan.step(
            f"{name}.attn.rotated", "rotate", y, angles, num_heads=attn.num_heads, prefix_tokens=prefix_tokens
        )
    y = plan.step(f"{name}.attn", "attention", y, num_heads=attn.num_heads, scale=attn.scale)
    y = plan.linear(f"{name}.attn.proj", attn.proj, y)
    y = plan.scale(f"{name}.ls1", block.ls1, y)
    x = plan.step(f"{name}.middle", "add", (x, y))
    y = _mlp(plan, f"{name}.mlp", mlp, plan.norm(f"{name}.norm2", block.norm2, x))
    y = plan.scale(f"{name}.ls2", block.ls2, y)
    return plan.step(name, "add", (x, y))


def _mlp(plan: _Writer, name: str, mlp: Mlp | SwiGLU, x: str) -> str:
    x = plan.linear(f"{name}.fc1", mlp.fc1, x)
    if isinstance(mlp, SwiGLU):
        x = plan.step(f"{name}.act", "swiglu", x)
    else:
        x = plan.step(f"{name}.act", "activation", x, kind=activation_name(mlp.act))
    return plan.linear(f"{name}.fc2", mlp.fc2, x)


def _attention_pool(plan: _Writer, pool: AttentionPoolLatent, x: str) -> str:
    # Of the images it takes no more than their number.
    q = plan.step("attn_pool.latent", "latent", IMAGES, plan.constants(weight=("attn_pool.latent", pool.latent)))
    q, kv = plan.linear("attn_pool.q", pool.q, q), plan.linear("attn_pool.kv", pool.kv, x)
    scale = (pool.latent.shape[-1] // pool.num_heads) ** -0.5
    y = plan.step("attn_pool.attention", "attention", (q, kv), num_heads=pool.num_heads, scale=scale)
    x = plan.linear("attn_pool.proj", pool.proj, y)
    y = _mlp(plan, "attn_pool.mlp", pool.mlp, plan.norm("attn_pool.norm", pool.norm, x))
    return plan.step("pooled", "flatten", plan.step("attn_pool", "add", (x, y)))


# --------------------------------------------------------------------------------------------------------------------
# What a plan has no step for

_IDENTITY = (nn.Identity,)
_LINEARS, _NORMS = (*LINEAR, nn.Identity), (*LAYER_NORM, nn.Identity)
_MLP = {
    "mlp": (Mlp, SwiGLU),
    "mlp.fc1": LINEAR,
    "mlp.act": FUSED_ACTIVATION,
    "mlp.drop1": (*DROPOUT, nn.Identity),
    "mlp.fc2": LINEAR,
    "mlp.drop2": (*DROPOUT, nn.Identity),
}
# The types that each module of a model may have, by its name; those of a block by the name in it.
_MODEL = {
    "patch_embed": (PatchEmbed,),
    "patch_embed.proj": (nn.Conv2d,),
    "pos_drop": DROPOUT,
    "patch_drop": (*_IDENTITY, PatchDropout),
    "norm_pre": _NORMS,
    "blocks": (nn.Sequential,),
    "norm": _NORMS,
    "attn_pool": (AttentionPoolLatent,),
    "attn_pool.q": LINEAR,
    "attn_pool.kv": LINEAR,
    "attn_pool.proj": LINEAR,
    "attn_pool.norm": LAYER_NORM,
    **{f"attn_pool.{name}": types for name, types in _MLP.items()},
    "fc_norm": _NORMS,
    "head_drop": DROPOUT,
    "head": _LINEARS,
    "head_dist": _LINEARS,
}
_BLOCK = {
    "": (Block,),
    "norm1": LAYER_NORM,
    "attn": (Attention,),
    "attn.qkv": LINEAR,
    "attn.attn_drop": (*DROPOUT, nn.Identity),
    "attn.proj": LINEAR,
    "attn.proj_drop": (*DROPOUT, nn.Identity),
    "ls1": LAYER_SCALE,
    "drop_path1": DROP_PATH,
    "norm2": LAYER_NORM,
    **_MLP,
    "ls2": LAYER_SCALE,
    "drop_path2": DROP_PATH,
}


def _check(model: VisionTransformer) -> None:
    """Raise ValueError, naming the module, for what a plan would silently leave out."""
    check_serves(model)
    if type(model) is not VisionTransformer:
        raise ValueError(f"model is a {type(model).__name__}, whose methods may differ from VisionTransformer's")
    for name, module in model.named_modules():
        if not name:
            continue
        where = f"model.{name}"
        parts = name.split(".", 2)
        in_block = parts[0] == "blocks" and len(parts) > 1
        types = _BLOCK.get(parts[2] if len(parts) > 2 else "") if in_block else _MODEL.get(name)
        if types is None or type(module) not in types:
            raise ValueError(f"{where} is a {type(module).__name__}, which a frozen model has no step for")
    if model.patch_embed.can_fuse() is False or not model.patch_embed.flatten:
        raise ValueError("model.patch_embed is no plain projection of patches, which a frozen model has no step for")
