"""Where each library keeps the tensors of a Vision Transformer: one table a format, and renaming by it, both ways.

A format's names were read from files that the library itself wrote; where the layout is defined stands above each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from .config import IMAGENET, ViTConfig

State = dict[str, torch.Tensor]
Names = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """How one library names the tensors of a model.

    source: whose checkpoint it is. telling: a regex for a name that every such file has, and none of a format that
    stands behind it in `FORMATS`. names: timm's name -> theirs, where # is a block's number and * weight or bias; of
    several of theirs, stacked along the first axis, timm's is made. spellings: regexes for other names of theirs, and
    what each is in `names`. unused: a regex for names of what no forward pass of ours reads. fold: the class token has
    a position of its own beside registers, which timm adds to the token. layout: what has to be done to the tensors
    before they are renamed; unlayout: the way back. facts: fields of ViTConfig that shapes do not tell, as every model
    in this format has them, unless what lies beside the tensors says otherwise: see `reading.read_checkpoint`.
    """

    source: str
    telling: str
    names: Names
    spellings: tuple[tuple[str, str], ...] = ()
    unused: str = r"(?!)"
    fold: bool = False
    layout: Callable[[State], State] | None = None
    unlayout: Callable[[State], State] | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


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
    facts=IMAGENET,
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


def _tower_layout(state: State) -> State:
    """Tokens and positions of transformers' and OpenAI's towers with timm's axes; q of the pool apart from k and v; the
    projection to what images share with text as a classifier, whose bias is zero."""
    found = {}
    averages = "classifier.weight" in state  # in place of the pool, which lies unused beside it
    for name, tensor in state.items():
        if name in _ROWS:
            found[name.removesuffix(".weight")] = tensor[(None,) * (3 - tensor.dim())]
        elif averages and name.startswith("head."):
            continue
        elif name.startswith("head.attention.in_proj_") and tensor.dim() and not len(tensor) % 3:
            third = len(tensor) // 3
            for part, rows in (("q", tensor[:third]), ("kv", tensor[third:])):
                found[name.replace("in_proj_", f"{part}.")] = rows
        elif name == "proj" and tensor.dim() == 2:
            found["visual_projection.weight"] = tensor.T.contiguous()
        else:
            found[name] = tensor
    if "visual_projection.weight" in found:
        weight = found["visual_projection.weight"]
        found["visual_projection.bias"] = weight.new_zeros(weight.shape[:1])
    return found


def _tower_unlayout(state: State) -> State:
    found = {}
    for name, tensor in state.items():
        inner = name.removeprefix("vision_model.")
        if inner == "embeddings.position_embedding":
            found[f"{name}.weight"] = tensor[0]
        elif inner == "embeddings.class_embedding":
            found[name] = tensor.flatten()
        elif inner.startswith("head.attention.q."):
            rows = (tensor, state[name.replace(".q.", ".kv.")])
            found[name.replace("attention.q.", "attention.in_proj_")] = torch.cat(rows)
        elif inner == "visual_projection.bias":
            if tensor.any():
                raise ValueError("transformers' CLIP has no bias of its projection, the model's is not zero")
        elif not inner.startswith("head.attention.kv."):
            found[name] = tensor
    return found


# transformers/models/{clip,siglip}/modeling_*.py.
_ROWS = ("embeddings.class_embedding", "embeddings.position_embedding.weight")
_ROWS += ("class_embedding", "positional_embedding")
_HF_CLIP = Format(
    "transformers' CLIP",
    r"^embeddings\.class_embedding$",
    {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.*": "embeddings.patch_embedding.*",
        "norm_pre.*": "pre_layrnorm.*",
        **_in_blocks(
            "encoder.layers.#.",
            {
                "norm1.*": "layer_norm1.*",
                "attn.qkv.*": tuple(f"self_attn.{part}_proj.*" for part in "qkv"),
                "attn.proj.*": "self_attn.out_proj.*",
                "norm2.*": "layer_norm2.*",
                "mlp.fc1.*": "mlp.fc1.*",
                "mlp.fc2.*": "mlp.fc2.*",
            },
        ),
        "norm.*": "post_layernorm.*",
        "head.*": "visual_projection.*",
    },
    unused=r"^embeddings\.position_ids$",
    layout=_tower_layout,
    unlayout=_tower_unlayout,
    facts={"activation": "quick_gelu", "norm_eps": 1e-5},
)
_HF_SIGLIP = replace(
    _HF_CLIP,
    source="transformers' SigLIP",
    telling=r"^embeddings\.patch_embedding\.bias$",
    names={
        **{
            name: theirs for name, theirs in _HF_CLIP.names.items() if name not in ("cls_token", "norm_pre.*", "head.*")
        },
        "attn_pool.latent": "head.probe",
        "attn_pool.q.*": "head.attention.q.*",
        "attn_pool.kv.*": "head.attention.kv.*",
        "attn_pool.proj.*": "head.attention.out_proj.*",
        "attn_pool.norm.*": "head.layernorm.*",
        "attn_pool.mlp.fc1.*": "head.mlp.fc1.*",
        "attn_pool.mlp.fc2.*": "head.mlp.fc2.*",
        "head.*": "classifier.*",
    },
    facts={"activation": "gelu_tanh"},
)
# openai/CLIP, clip/model.py; mlfoundations/open_clip, src/open_clip/transformer.py.
_OPENAI_CLIP = Format(
    "CLIP as OpenAI and OpenCLIP release it",
    r"^transformer\.resblocks\.",
    {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj.*": "conv1.*",
        "norm_pre.*": "ln_pre.*",
        **_in_blocks(
            "transformer.resblocks.#.",
            {
                "norm1.*": "ln_1.*",
                "attn.qkv.*": "attn.in_proj_*",
                "attn.proj.*": "attn.out_proj.*",
                "norm2.*": "ln_2.*",
                "mlp.fc1.*": "mlp.c_fc.*",
                "mlp.fc2.*": "mlp.c_proj.*",
            },
        ),
        "norm.*": "ln_post.*",
        "head.*": "visual_projection.*",
    },
    layout=_tower_layout,
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
        "attn_pool.latent": "MAPHead_#/probe",
        "attn_pool.q.*": "MAPHead_#/MultiHeadDotProductAttention_0/query/*",
        "attn_pool.kv.*": tuple(f"MAPHead_#/MultiHeadDotProductAttention_0/{part}/*" for part in ("key", "value")),
        "attn_pool.proj.*": "MAPHead_#/MultiHeadDotProductAttention_0/out/*",
        "attn_pool.norm.*": "MAPHead_#/LayerNorm_0/*",
        "attn_pool.mlp.fc1.*": "MAPHead_#/MlpBlock_0/Dense_0/*",
        "attn_pool.mlp.fc2.*": "MAPHead_#/MlpBlock_0/Dense_1/*",
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
    facts=IMAGENET,
)


def _zero_key_bias(state: State) -> State:
    """A bias of zeros for the keys wherever the queries have one and the keys none."""
    found = dict(state)
    for name, tensor in state.items():
        key = re.sub(r"\.q(_bias|_proj\.bias)$", r".k\1", name)
        if key != name:
            found.setdefault(key, torch.zeros_like(tensor))
    return found


def _no_key_bias(state: State) -> State:
    found = {}
    for name, tensor in state.items():
        if name.endswith(".attn.qkv.bias"):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            found |= {name.replace("qkv.bias", f"{part}_bias"): rows for part, rows in parts}
        else:
            found[name] = tensor
    for name in [name for name in found if re.search(r"\.k(_bias|_proj\.bias)$", name)]:
        if found.pop(name).any():
            raise ValueError(f"DINOv3 has no bias of its keys, the model's {name} is not zero")
    return found


# facebookresearch/deit, models_v2.py; pytorch-image-models, timm/models/eva.py, which has the same names for the
# layer-scale of DINOv3, and q, k, v and the gated layers apart.
_GAMMAS: Names = {f"blocks.#.ls{n}.gamma": f"blocks.#.gamma_{n}" for n in (1, 2)}
_GATES: Names = {"blocks.#.mlp.fc1.*": ("blocks.#.mlp.fc1_g.*", "blocks.#.mlp.fc1_x.*")}
_BIASES: Names = {"blocks.#.attn.qkv.*": tuple(f"blocks.#.attn.{part}_*" for part in "qkv")}
_DEIT3 = Format(
    "DeiT III as Meta releases it, or timm's DINOv3",
    r"\.gamma_1$",
    {**_GAMMAS, **_GATES, **_BIASES},
    layout=_zero_key_bias,
    unlayout=_no_key_bias,
)
# transformers/models/dinov3_vit/modeling_dinov3_vit.py; in memory there is "model." before the layers.
_HF_DINOV3 = Format(
    "transformers' DINOv3",
    r"^embeddings\.patch_embeddings\.weight$",
    {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.*": "embeddings.patch_embeddings.*",
        **_in_blocks(
            "layer.#.",
            {
                "attn.qkv.*": tuple(f"attention.{part}_proj.*" for part in "qkv"),
                "attn.proj.*": "attention.o_proj.*",
                "norm1.*": "norm1.*",
                "norm2.*": "norm2.*",
                "ls1.gamma": "layer_scale1.lambda1",
                "ls2.gamma": "layer_scale2.lambda1",
                "mlp.fc1.*": "mlp.up_proj.*",
                "mlp.fc2.*": "mlp.down_proj.*",
            },
        ),
        "norm.*": "norm.*",
    },
    spellings=((r"^model\.layer\.", "layer."),),
    unused=r"^embeddings\.mask_token$",
    layout=_zero_key_bias,
    unlayout=_no_key_bias,
    facts={"rope_temperature": 100.0},
)
_HF_DINOV3_GATED = replace(
    _HF_DINOV3,
    telling=r"^(model\.)?layer\.\d+\.mlp\.gate_proj\.",
    names=_HF_DINOV3.names | _in_blocks("layer.#.", {"mlp.fc1.*": ("mlp.gate_proj.*", "mlp.up_proj.*")}),
)


def _masked_bias(state: State) -> State:
    """The bias of q, k and v without that of k, whose mask in the files is 0, or before training NaN."""
    found = dict(state)
    for name, tensor in state.items():
        if name.endswith(".attn.qkv.bias") and f"{name}_mask" in state and tensor.dim() == 1 and not len(tensor) % 3:
            q, k, v = tensor.chunk(3)
            found[name] = torch.cat([q, torch.zeros_like(k), v])
    return found


# facebookresearch/dinov3, dinov3/models/vision_transformer.py and dinov3/layers.
_DINOV3 = Format(
    "DINOv3 as Meta releases it",
    r"^storage_tokens$|^rope_embed\.periods$",
    {
        "reg_token": "storage_tokens",
        "blocks.#.mlp.fc1.*": ("blocks.#.mlp.w1.*", "blocks.#.mlp.w2.*"),
        "blocks.#.mlp.fc2.*": "blocks.#.mlp.w3.*",
    },
    unused=r"^(rope_embed|local_cls_norm|projectors)\.|\.bias_mask$",
    layout=_masked_bias,
    facts={"rope_temperature": 100.0},
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
    *(_TORCHVISION, _HF_DEIT, _HF_VIT, _HF_DINOV3_GATED, _HF_DINOV3, _HF_SWIGLU, _HF_SWIGLU_IN_MEMORY, _HF_DINOV2),
    *(_HF_CLIP, _HF_SIGLIP, _OPENAI_CLIP, _FLAX),
    *(_MAE, _DINOV3, _DEIT3, _DINOV2, _TIMM),
)

# What is not read, and a name that tells each; where one has another's names as well, it comes first.
_NOT_READ = {
    "Swin": r"(layers\.\d+\.blocks|features\.\d+)\.\d+\..*relative_position_bias_table",
    "BEiT or EVA": r"attn\.q_bias|\.relative_position_bias_table|\.lambda_1$",
    "CaiT": r"blocks_token_only\.",
    "Segment Anything or ViTDet": r"attn\.rel_pos_h",
    "mmpretrain": r"layers\.\d+\.ln1\.",
    "ResNet": r"layer1\.0\.conv1\.",
    "ConvNeXt": r"stages\.0\.(blocks\.)?0\.(conv_dw|dwconv)\.",
}

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
ACTIVATION_OF = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
ACTIVATION_OF |= {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_python": "gelu"}
_LEAF = re.compile(r"(weight|bias)$")
BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[./])")
_PATCH_WEIGHTS = (
    "patch_embed.proj.weight",
    "conv_proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.weight",
    "conv1.weight",
    "embedding/kernel",
)
_BESIDE = re.compile(r"(?:(?:cls_|distillation_)?classifier|visual_projection)\.(?:weight|bias)")


def model_prefixes(state: dict) -> list[str]:
    """What stands before the patch projection's name in `state`: a prefix for each model that is in it."""
    found = []
    for name in map(str, state):
        for weight in _PATCH_WEIGHTS:
            if name == weight or name.endswith((f".{weight}", f"/{weight}")):
                prefix = name.removesuffix(weight)
                if weight != "conv1.weight" or f"{prefix}class_embedding" in state:  # a name that many layers have
                    found.append(prefix)
    return found


def without_prefix(state: State, prefix: str) -> State:
    """What is under `prefix`, without it; and transformers' classifiers, which stand beside their encoder."""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if any(name.startswith("embeddings.patch_embedding") for name in found):
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
    if to == "timm" and config.rope_temperature is None:
        return {name: tensor for name, tensor in state.items() if name != "mask_token"}
    format, prefix = _writer(to, config)
    written: State = {}
    for name, tensor in state.items():
        if name == "mask_token" and name not in format.names:
            continue
        if name == "pos_embed" and config.no_embed_class:
            tensor = F.pad(tensor, (0, 0, 1 + config.distilled, 0))
        template, number, leaf = _split(name)
        theirs = format.names.get(template, template)
        parts = (theirs,) if isinstance(theirs, str) else theirs
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            beside = "" if template.startswith("head") else prefix
            written[beside + _join(part, number, leaf)] = piece
    return format.unlayout(written) if format.unlayout else written


def _writer(to: str, config: ViTConfig) -> tuple[Format, str]:
    """The format that `config`'s model is written in, and what stands before all names but the classifier's."""
    gated = config.mlp == "swiglu"
    needed = {"class_token": True, "global_pool": "token", "norm_after_pool": False, "final_norm": True}
    needed |= {"pre_norm": False, "rope_temperature": None}
    tower = {"qkv_bias": True, "reg_tokens": 0, "init_values": None, "mlp": "mlp", "no_embed_class": False}
    if to == "torchvision":
        library, format, prefix = to, _TORCHVISION, ""
        needed |= {"distilled": False, "reg_tokens": 0, "init_values": None, "mlp": "mlp", "activation": "gelu"}
        needed |= {"qkv_bias": True, "in_chans": 3}
    elif to == "timm":  # DINOv3, which is another class there
        names = {**_GAMMAS, **(_GATES if gated else {})}
        return replace(_DEIT3, names=names), ""
    elif config.rope_temperature is not None:
        library, format, prefix = f"{to}' DINOv3", _HF_DINOV3_GATED if gated else _HF_DINOV3, ""
        needed = {"class_token": True, "distilled": False, "norm_after_pool": False, "final_norm": True}
        needed |= {"pre_norm": False, "num_classes": 0}
    elif config.pre_norm:
        library, format, prefix = f"{to}' CLIP", _HF_CLIP, "vision_model." if config.num_classes else ""
        needed |= {**tower, "pre_norm": True}
    elif config.global_pool == "map":
        library, format, prefix = f"{to}' SigLIP", _HF_SIGLIP, ""
        needed |= {**tower, "class_token": False, "global_pool": "map", "num_classes": 0}
    elif config.init_values is not None:
        library, format, prefix = f"{to}' Dinov2", _HF_SWIGLU if gated else _HF_DINOV2, ""
        needed |= {"distilled": False, "num_classes": 0}  # its own classifier reads the mean of the patches too
        needed |= {"no_embed_class": True} if config.reg_tokens else {}
    else:
        library, format = to, _HF_DEIT if config.distilled else _HF_VIT
        prefix = ("deit." if config.distilled else "vit.") if config.num_classes else ""
        needed |= {"reg_tokens": 0, "mlp": "mlp"}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"{library} has only {name}={value!r}, the model has {getattr(config, name)!r}")
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
    family = format.source.removeprefix("transformers' ")
    family += "WithRegisters" if config.reg_tokens and family == "Dinov2" else ""
    ending = "Model" if not prefix else "ForImageClassification" + ("WithTeacher" if config.distilled else "")
    if family == "DINOv3":
        family, ending = "DINOv3ViT", "Model"
    elif family == "SigLIP":
        family, ending = "Siglip", "VisionModel"
    elif family == "CLIP":
        ending = "VisionModelWithProjection" if config.num_classes else "VisionModel"
    types = {"ViT": "vit", "DeiT": "deit", "Dinov2": "dinov2", "Dinov2WithRegisters": "dinov2_with_registers"}
    types |= {"CLIP": "clip_vision_model", "Siglip": "siglip_vision_model", "DINOv3ViT": "dinov3_vit"}
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
    facts |= {} if gated and family != "DINOv3ViT" else {"hidden_act": _ACTIVATIONS[config.activation]}
    if family == "DINOv3ViT":
        facts |= {"query_bias": facts["qkv_bias"], "key_bias": False, "value_bias": facts.pop("qkv_bias")}
        facts |= {"num_register_tokens": config.reg_tokens, "rope_theta": config.rope_temperature}
        return facts | {"use_gated_mlp": gated, "intermediate_size": hidden // 2 if gated else hidden}
    if config.num_classes:
        facts |= {"projection_dim" if family == "CLIP" else "num_labels": config.num_classes}
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
