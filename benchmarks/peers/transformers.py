"""Hugging Face transformers (5 or newer): ViT, DeiT with both heads, Dinov2 with and without registers, on sdpa."""

from __future__ import annotations

from functools import partial

import torch

from fastvit import torchvision_shim
from fastvit.models.formats import transformers_config

from . import Built
from ._common import copy_into

# Ours to theirs: the part of a name that every family has in common, and what ViT and DeiT, and Dinov2, call the rest.
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "norm": "layernorm",
}
_VIT_NAMES = {"blocks": "layers", "norm1": "layernorm_before", "norm2": "layernorm_after"}
_DINOV2_NAMES = {"blocks": "encoder.layer"}
# Of a tensor that they keep in parts.
_PARTS = {"attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj")}
_SWIGLU_PARTS = {"mlp.fc1": ("mlp.gate_proj", "mlp.up_proj")}


def unfit(peer, case, config, device) -> str | None:
    dinov2 = config.init_values is not None
    for name, needed in (
        *(("class_token", True), ("global_pool", "token"), ("norm_after_pool", False), ("final_norm", True)),
        *((("distilled", False), ("num_classes", 0)) if dinov2 else (("reg_tokens", 0), ("mlp", "mlp"))),
    ):
        if getattr(config, name) != needed:
            family = "of models with layer scale" if dinov2 else "of models without layer scale"
            return f"has only {name}={needed!r} {family}, the model has {getattr(config, name)!r}"
    if config.distilled and not config.num_classes:
        return "has no distilled model without its classifiers"
    return None


def build(peer, case, ours, inputs) -> Built:
    torchvision_shim.install()
    import transformers

    config, prefix, pick = ours.config, "", lambda out: out.pooler_output  # Dinov2's is the normalised class token
    facts = transformers_config(config)
    make = getattr(transformers, facts["architectures"][0])
    if config.num_classes:
        prefix, pick = ("deit." if config.distilled else "vit."), lambda out: out.logits
    elif config.init_values is None:
        make, pick = partial(make, add_pooling_layer=False), lambda out: out.last_hidden_state[:, 0]
    theirs = transformers.AutoConfig.for_model(**facts, attn_implementation="sdpa")
    model = copy_into(ours, lambda: make(theirs), _convert(ours.state_dict(), config, prefix))
    return Built(lambda images: pick(model(images)), "positions of the prefix zero" if config.no_embed_class else "")


def _convert(state: dict[str, torch.Tensor], config, prefix: str) -> dict[str, torch.Tensor]:
    """Our tensors under the names of the family; `prefix` is that of all but the classifiers."""
    dinov2 = config.init_values is not None
    names = _NAMES | (_DINOV2_NAMES if dinov2 else _VIT_NAMES)
    parts = _PARTS
    if config.mlp == "swiglu":
        names, parts = names | {"mlp.fc2": "mlp.down_proj"}, parts | _SWIGLU_PARTS
    heads = {"head": "cls_classifier" if config.distilled else "classifier", "head_dist": "distillation_classifier"}

    converted = {}
    for name, tensor in state.items():
        block, stem, leaf = _split(name)
        if stem in heads:
            converted[f"{heads[stem]}{leaf}"] = tensor
            continue
        before = f"{prefix}{names['blocks']}.{block}." if block else prefix
        wholes = parts.get(stem, (names.get(stem, stem),))
        for whole, part in zip(wholes, tensor.chunk(len(wholes)), strict=True):
            converted[f"{before}{whole}{leaf}"] = part
    positions = f"{prefix}embeddings.position_embeddings"
    if config.no_embed_class:
        converted[positions] = torch.nn.functional.pad(converted[positions], (0, 0, 1 + config.distilled, 0))
    if dinov2:
        # For training with masked patches only.
        converted["embeddings.mask_token"] = torch.zeros(1, config.embed_dim)
    return converted


def _split(name: str) -> tuple[str, str, str]:
    """ "blocks.3.attn.qkv.weight" -> "3", "attn.qkv", ".weight"; "cls_token" -> "", "cls_token", ""."""
    block = ""
    if name.startswith("blocks."):
        _, block, name = name.split(".", 2)
    leaf = next((leaf for leaf in (".weight", ".bias") if name.endswith(leaf)), "")
    return block, name.removesuffix(leaf), leaf
