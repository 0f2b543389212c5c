"""Where each library keeps the tensors of a Vision Transformer: one table a format, and renaming by it, both ways.

A format's names were read from files that the library itself wrote; where the layout is defined stands above each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .config import ViTConfig

State = dict[str, torch.Tensor]
Names = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """How one library names the tensors of a model.

    source: whose checkpoint it is. telling: a regex for a name that every such file has, and none of a format that
    stands behind it in `FORMATS`. names: timm's name -> theirs, where # is a block's number and * weight or bias; of
    several of theirs, stacked along the first axis, timm's is made. spellings: regexes for other names of theirs, and
    what each is in `names`. unused: a regex for names of what no forward pass of ours reads. fold: the class token has
    a position of its own beside registers, which timm adds to the token. layout: what has to be done to the tensors.
    imagenet: all models that are released so take images normalised with ImageNet's mean and std.
    """

    source: str
    telling: str
    names: Names
    spellings: tuple[tuple[str, str], ...] = ()
    unused: str = r"(?!)"
    fold: bool = False
    layout: Callable[[State], State] | None = None
    imagenet: bool = False


def _in_blocks(prefix: str, names: Names) -> Names:
    """`names` within a block as names within a model, where `prefix` stands before each of theirs."""
    whole = {}
    for ours, theirs in names.items():
        parts = tuple(prefix + part for part in ((theirs,) if isinstance(theirs, str) else theirs))
        whole[f"blocks.#.{ours}"] = parts[0] if isinstance(theirs, str) else parts
    return whole


# torchvision/models/vision_transformer.py. Before version 0.13, and in the files it publishes, mlp.0 and mlp.3 are
# linear_1 and linear_2.
_TORCHVISION = Format(
    "torchvision's VisionTransformer",
    r"^conv_proj\.",
    {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj.*": "conv_proj.*",
        **_in_blocks(
            "encoder.layers.encoder_layer_#.",
            {
                "norm1.*": "ln_1.*",
                "attn.qkv.*": "self_attention.in_proj_*",
                "attn.proj.*": "self_attention.out_proj.*",
                "norm2.*": "ln_2.*",
                "mlp.fc1.*": "mlp.0.*",
                "mlp.fc2.*": "mlp.3.*",
            },
        ),
        "norm.*": "encoder.ln.*",
        "head.*": "heads.head.*",
    },
    spellings=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    imagenet=True,
)

# transformers/models/{vit,deit,dinov2,dinov2_with_registers}/modeling_*.py before version 5, and every file to this
# day; version 5 has other names in memory, and conversion_mapping.py between the two.
_EMBEDDINGS: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "norm.*": "layernorm.*",
}
_ATTENTION: Names = {
    "attn.qkv.*": tuple(f"attention.attention.{part}.*" for part in ("query", "key", "value")),
    "attn.proj.*": "attention.output.dense.*",
}
_IN_MEMORY = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_HF_VIT = Format(
    "transformers' ViT",
    r"(^|\.)layernorm_before\.",
    {
        **_EMBEDDINGS,
        **_in_blocks(
            "encoder.layer.#.",
            {
                **_ATTENTION,
                "norm1.*": "layernorm_before.*",
                "norm2.*": "layernorm_after.*",
                "mlp.fc1.*": "intermediate.dense.*",
                "mlp.fc2.*": "output.dense.*",
            },
        ),
        "head.*": "classifier.*",
    },
    spellings=(
        *_IN_MEMORY,
        (r"^layers\.", "encoder.layer."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    unused=r"^(pooler\.|embeddings\.mask_token$)",
)
_HF_DEIT = replace(
    _HF_VIT,
    source="transformers' DeiT",
    telling=r"^embeddings\.distillation_token$",
    names={
        **_HF_VIT.names,
        "dist_token": "embeddings.distillation_token",
        "head.*": "cls_classifier.*",
        "head_dist.*": "distillation_classifier.*",
    },
    spellings=(*_HF_VIT.spellings, (r"^classifier\.", "cls_classifier.")),
)
_HF_DINOV2 = Format(
    "transformers' Dinov2",
    r"\.layer_scale1\.lambda1$",
    {
        **_EMBEDDINGS,
        "reg_token": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        **_in_blocks(
            "encoder.layer.#.",
            {
                **_ATTENTION,
                **{name: name for name in ("norm1.*", "norm2.*", "mlp.fc1.*", "mlp.fc2.*")},
                "ls1.gamma": "layer_scale1.lambda1",
                "ls2.gamma": "layer_scale2.lambda1",
            },
        ),
        "head.*": "classifier.*",
    },
    spellings=_IN_MEMORY,
    fold=True,
)
_HF_SWIGLU = replace(
    _HF_DINOV2,
    telling=r"\.mlp\.weights_in\.",
    names=_HF_DINOV2.names
    | _in_blocks("encoder.layer.#.", {"mlp.fc1.*": "mlp.weights_in.*", "mlp.fc2.*": "mlp.weights_out.*"}),
)
_HF_SWIGLU_IN_MEMORY = replace(
    _HF_DINOV2,
    telling=r"\.mlp\.gate_proj\.",
    names=_HF_DINOV2.names
    | _in_blocks(
        "encoder.layer.#.", {"mlp.fc1.*": ("mlp.gate_proj.*", "mlp.up_proj.*"), "mlp.fc2.*": "mlp.down_proj.*"}
    ),
)


def _flax_layout(state: State) -> State:
    """Flax's arrays as PyTorch has them: blocks that are stacked one by one; kernels, which have their inputs first,
    and those of attention its heads on an axis of their own, as weights. The layer before a classifier of zeros, which
    files for fine-tuning have, is left out: timm has no such layer."""
    found = {}
    zeros = "head/kernel" not in state or not state["head/kernel"].any()
    for name, tensor in state.items():
        if name.startswith("pre_logits/") and zeros:
            continue
        if "/encoderblock/" in name and tensor.dim():  # big_vision's scan over depth
            found |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): one for i, one in enumerate(tensor)}
        else:
            found[name] = tensor
    for name, tensor in found.items():
        to_heads = re.search(r"/(query|key|value)/(kernel|bias)$", name)
        if name.endswith("/bias") and to_heads:
            found[name] = tensor.flatten()
        elif name.endswith("/kernel") and tensor.dim() == 4:
            found[name] = tensor.permute(3, 2, 0, 1).contiguous()
        elif name.endswith("/kernel") and tensor.dim() >= 2:
            found[name] = (tensor.flatten(1) if to_heads else tensor.flatten(0, -2)).T.contiguous()
    return found


# google-research/vision_transformer, vit_jax/models_vit.py; google-research/big_vision, big_vision/models/vit.py, whose
# modules are counted otherwise.
_FLAX = Format(
    "Google's JAX models",
    r"^Transformer/encoderblock",
    {
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
        "patch_embed.proj.*": "embedding/*",
        **_in_blocks(
            "Transformer/encoderblock_#/",
            {
                "norm1.*": "LayerNorm_0/*",
                "attn.qkv.*": tuple(f"MultiHeadDotProductAttention_1/{part}/*" for part in ("query", "key", "value")),
                "attn.proj.*": "MultiHeadDotProductAttention_1/out/*",
                "norm2.*": "LayerNorm_2/*",
                "mlp.fc1.*": "MlpBlock_3/Dense_0/*",
                "mlp.fc2.*": "MlpBlock_3/Dense_1/*",
            },
        ),
        "norm.*": "Transformer/encoder_norm/*",
        "head.*": "head/*",
    },
    spellings=(
        (r"^(Transformer/)?pos_embedding$", "Transformer/posembed_input/pos_embedding"),
        (r"^(Transformer/encoderblock_\d+/)MultiHeadDotProductAttention_0/", r"\1MultiHeadDotProductAttention_1/"),
        (r"^(Transformer/encoderblock_\d+/)LayerNorm_1/", r"\1LayerNorm_2/"),
        (r"^(Transformer/encoderblock_\d+/)MlpBlock_0/", r"\1MlpBlock_3/"),
        (r"/(kernel|scale)$", "/weight"),
    ),
    layout=_flax_layout,
)

# The following have timm's names for all that stands in no table.
# facebookresearch/mae, models_mae.py.
_MAE = Format(
    "MAE before fine-tuning",
    r"^decoder_(blocks\.|pos_embed$)",
    {},
    unused=r"^(decoder_|mask_token$)",
    imagenet=True,
)
# facebookresearch/deit, models_v2.py.
_DEIT3 = Format(
    "DeiT III as Meta releases it", r"\.gamma_1$", {f"blocks.#.ls{n}.gamma": f"blocks.#.gamma_{n}" for n in (1, 2)}
)
# facebookresearch/dinov2, dinov2/models/vision_transformer.py and dinov2/layers/swiglu_ffn.py. Large models there keep
# their blocks in chunks, blocks.<chunk>.<block>.
_DINOV2 = Format(
    "the original DINOv2",
    r"^register_tokens$|\.mlp\.w12\.|^blocks\.\d+\.\d+\.",
    {
        "reg_token": "register_tokens",
        "blocks.#.mlp.fc1.*": "blocks.#.mlp.w12.*",
        "blocks.#.mlp.fc2.*": "blocks.#.mlp.w3.*",
    },
    spellings=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
    fold=True,
)
# Old ViT files have an unused layer before the classifier.
_TIMM = Format("timm", r"^patch_embed\.proj\.weight$", {}, unused=r"^pre_logits\.")

FORMATS = (
    *(_TORCHVISION, _HF_DEIT, _HF_VIT, _HF_SWIGLU, _HF_SWIGLU_IN_MEMORY, _HF_DINOV2, _FLAX),
    *(_MAE, _DEIT3, _DINOV2, _TIMM),
)

# What is not read, and a name that tells each; where one has another's names as well, it comes first.
_NOT_READ = {
    "Swin": r"(layers\.\d+\.blocks|features\.\d+)\.\d+\..*relative_position_bias_table",
    "BEiT or EVA": r"attn\.q_bias|\.relative_position_bias_table|\.lambda_1$",
    "CaiT": r"blocks_token_only\.",
    "Segment Anything or ViTDet": r"attn\.rel_pos_h",
    "CLIP as OpenAI and OpenCLIP release it": r"transformer\.resblocks\.",
    "DINOv3 as Meta releases it": r"storage_tokens|rope_embed\.periods",
    "mmpretrain": r"layers\.\d+\.ln1\.",
    "transformers' CLIP": r"embeddings\.class_embedding",
    "transformers' SigLIP": r"embeddings\.patch_embedding\.",
    "transformers' DINOv3": r"embeddings\.patch_embeddings\.weight",
    "SigLIP, or another of Google's with attention as its pool": r"MAPHead_0/",
    "ResNet": r"layer1\.0\.conv1\.",
    "ConvNeXt": r"stages\.0\.(blocks\.)?0\.(conv_dw|dwconv)\.",
}

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
_LEAF = re.compile(r"(weight|bias)$")
BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[./])")
_PATCH_WEIGHTS = (
    "patch_embed.proj.weight",
    "conv_proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embedding/kernel",
)
_BESIDE = re.compile(r"(?:cls_|distillation_)?classifier\.(?:weight|bias)")


def model_prefixes(state: dict) -> list[str]:
    """What stands before the patch projection's name in `state`: a prefix for each model that is in it."""
    found = []
    for name in map(str, state):
        for weight in _PATCH_WEIGHTS:
            if name == weight or name.endswith((f".{weight}", f"/{weight}")):
                found.append(name.removesuffix(weight))
    return found


def without_prefix(state: State, prefix: str) -> State:
    """What is under `prefix`, without it; and transformers' classifiers, which stand beside their encoder."""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "embeddings.patch_embeddings.projection.weight" in found:
        outside = re.sub(r"[^.]+\.$", "", prefix)
        for name, tensor in state.items():
            if name.startswith(outside) and _BESIDE.fullmatch(name, len(outside)):
                found[name.removeprefix(outside)] = tensor
    return found


def not_read(state: State) -> str | None:
    """What `state` is a checkpoint of, if it is one of the known ones that no format here is for."""
    names = "\n".join(state)
    return next((source for source, telling in _NOT_READ.items() if re.search(telling, names)), None)


def to_timm(state: State) -> tuple[State, Format]:
    """`state` under timm's names, in its dtypes, and the format that it came in. Neither it nor its tensors change.

    A sum of a class token and its position in half precision is in float32. Names that the format does not know stay as
    they are, and so do parts of a tensor that are not all there or do not fit each other: they are found unexpected.
    """
    format = next((one for one in FORMATS if any(re.search(one.telling, name) for name in state)), _TIMM)
    ours = {}  # theirs -> timm's, which part of it, of how many
    for name, theirs in format.names.items():
        parts = (theirs,) if isinstance(theirs, str) else theirs
        ours |= {part: (name, place, len(parts)) for place, part in enumerate(parts)}
    found: State = {}
    waiting: dict[str, dict[int, tuple[str, torch.Tensor]]] = {}
    for name, tensor in (format.layout(state) if format.layout else state).items():
        for pattern, replacement in format.spellings:
            name = re.sub(pattern, replacement, name)
        if re.search(format.unused, name):
            continue
        template, number, leaf = _split(name)
        if template not in ours:
            found[name] = tensor
            continue
        whole, place, count = ours[template]
        whole = _join(whole, number, leaf)
        if count == 1:
            found[whole] = tensor
            continue
        parts = waiting.setdefault(whole, {})
        parts[place] = (name, tensor)
        if len(parts) == count:
            tensors = [parts[i][1] for i in range(count)]
            if len({(part.shape[1:], part.dtype) for part in tensors}) == 1 and tensor.dim():
                found[whole] = torch.cat(tensors)
                del waiting[whole]
    for parts in waiting.values():
        found |= dict(parts.values())
    if format.fold and {"reg_token", "cls_token", "pos_embed"} <= found.keys():
        token, table = found["cls_token"], found["pos_embed"]
        if token.dim() == table.dim() == 3 and token.shape == table[:, :1].shape:
            total = token.float() if token.dtype in (torch.float16, torch.bfloat16) else token
            found |= {"cls_token": total + table[:, :1], "pos_embed": table[:, 1:]}
    return found, format


def from_timm(state: State, to: str, config: ViTConfig) -> State:
    """`state`, which has timm's names and fits `config`, under the names of "timm", "torchvision" or "transformers":
    those that torchvision's load_state_dict and transformers' from_pretrained take.

    A class token without a position gets one of zeros, which changes no output. Raises ValueError for a `config` that
    the library has no model for.
    """
    if to == "timm":
        return {name: tensor for name, tensor in state.items() if name != "mask_token"}
    format, prefix = _writer(to, config)
    written: State = {}
    for name, tensor in state.items():
        if name == "mask_token" and name not in format.names:
            continue
        if name == "pos_embed" and config.no_embed_class:
            tensor = F.pad(tensor, (0, 0, 1 + config.distilled, 0))
        template, number, leaf = _split(name)
        theirs = format.names[template]
        parts = (theirs,) if isinstance(theirs, str) else theirs
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            beside = "" if template.startswith("head") else prefix
            written[beside + _join(part, number, leaf)] = piece
    return written


def _writer(to: str, config: ViTConfig) -> tuple[Format, str]:
    """The format that `config`'s model is written in, and what stands before all names but the classifier's."""
    gated = config.mlp == "swiglu"
    needed = {"class_token": True, "global_pool": "token", "norm_after_pool": False, "final_norm": True}
    if to == "torchvision":
        library, format, prefix = to, _TORCHVISION, ""
        needed |= {"distilled": False, "reg_tokens": 0, "init_values": None, "mlp": "mlp", "activation": "gelu"}
        needed |= {"qkv_bias": True, "in_chans": 3}
    elif config.init_values is not None:
        library, format, prefix = f"{to}' Dinov2", _HF_SWIGLU if gated else _HF_DINOV2, ""
        needed |= {"distilled": False, "num_classes": 0}  # its own classifier reads the mean of the patches too
        needed |= {"no_embed_class": True} if config.reg_tokens else {}
    else:
        library, format = to, _HF_DEIT if config.distilled else _HF_VIT
        prefix = ("deit." if config.distilled else "vit.") if config.num_classes else ""
        needed |= {"reg_tokens": 0, "mlp": "mlp"}
    for field, value in needed.items():
        if getattr(config, field) != value:
            raise ValueError(f"{library} has only {field}={value!r}, the model has {getattr(config, field)!r}")
    return format, prefix


def _split(name: str) -> tuple[str, str, str]:
    """ "blocks.3.attn.qkv.weight" -> "blocks.#.attn.qkv.*", "3", "weight"."""
    leaf = _LEAF.search(name)
    number = BLOCK_NUMBER.search(name)
    template = BLOCK_NUMBER.sub("#", _LEAF.sub("*", name), count=1)
    return template, number.group() if number else "", leaf.group() if leaf else ""


def _join(template: str, number: str, leaf: str) -> str:
    return template.replace("#", number).replace("*", leaf)


def transformers_config(config: ViTConfig) -> dict:
    """What config.json has to say of the model that `from_timm` writes for transformers; "architectures" names its
    class. Raises ValueError where there is none."""
    format, prefix = _writer("transformers", config)
    gated = config.mlp == "swiglu"
    family = format.source.removeprefix("transformers' ") + ("WithRegisters" if config.reg_tokens else "")
    ending = "Model" if not prefix else "ForImageClassification" + ("WithTeacher" if config.distilled else "")
    types = {"ViT": "vit", "DeiT": "deit", "Dinov2": "dinov2", "Dinov2WithRegisters": "dinov2_with_registers"}
    hidden = int(config.embed_dim * config.mlp_ratio)
    facts = {
        "model_type": types[family],
        "architectures": [family + ending],
        "image_size": _one_or_both(config.img_size),
        "patch_size": _one_or_both(config.patch_size),
        "num_channels": config.in_chans,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
    }
    facts |= {} if gated else {"hidden_act": _ACTIVATIONS[config.activation]}
    facts |= {"num_labels": config.num_classes} if config.num_classes else {}
    if config.init_values is None:
        return facts | {"intermediate_size": hidden}
    # A whole number in place of intermediate_size; of SwiGLU they take two thirds, for gate and value each.
    ratio = round(hidden / config.embed_dim * (0.75 if gated else 1))
    theirs = ratio * config.embed_dim
    if hidden != ((theirs * 2 // 3 + 7) // 8 * 16 if gated else theirs):
        raise ValueError(f"{format.source} has only whole mlp_ratios, the model has {config.mlp_ratio}")
    facts |= {"use_swiglu_ffn": gated, "mlp_ratio": ratio}
    return facts | ({"num_register_tokens": config.reg_tokens} if config.reg_tokens else {})


def _one_or_both(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)
