"""How the blocks, attention layers and MLPs of known forward passes are put together: the one place that knows other
libraries' names for the parts of a Vision Transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvit.nn.layers import FUSED_ACTIVATION, activation_name, sample_scale

from .forwards import known_forward

# Names of modules and attributes are those in the module that a layout is of, deeper ones by dots, "" itself. inside:
# modules between it and its layers, and the names in KNOWN that their forward passes must have.


@dataclass(frozen=True)
class AttentionLayout:
    """Self-attention as a module has it.

    qkv: its linear layers, packed as one or three apart; none where it holds in_proj_weight itself; biases(module): of
    q, k and v, where those have none. proj: the linear
    layer after it; heads: the attribute that has their number; rate: the one that has a rate of dropout; dropouts: its
    modules of dropout; nothing: those that must be nn.Identity. arguments(module, x, ...) are (attn_mask, is_causal),
    and with a rotary embedding its cos and sin as `ops.attention` has them, and whether pairs are neighbours, of
    a call, None where it asks for more; scale(module) is of the scores; refuse(module) says why the module is not plain
    attention, if it is not; alone(module) whether its output is all that it has to return. paired: it returns (output,
    None).
    """

    qkv: tuple[str, ...]
    proj: str
    heads: str
    arguments: Callable[..., tuple | None]
    scale: Callable[[nn.Module], float]
    refuse: Callable[[nn.Module], str | None]
    alone: Callable[[nn.Module], bool] = lambda module: True
    paired: bool = False
    rate: str | None = None
    dropouts: tuple[str, ...] = ()
    nothing: tuple[str, ...] = ()
    biases: Callable[[nn.Module], list[torch.Tensor | None]] | None = None
    inside: tuple[tuple[str, str], ...] = ()

    def num_heads(self, attention: nn.Module) -> int:
        """How many heads a module has."""
        return attrgetter(self.heads)(attention)

    def dropping(self, attention: nn.Module) -> bool:
        """Whether its rate of dropout is at work."""
        return self.rate is not None and attention.training and attrgetter(self.rate)(attention) > 0


@dataclass(frozen=True)
class MlpLayout:
    """Two linear layers with an activation between, SiLU where no module is named. fc1: one layer, or the gates' and
    the values' apart; refuse, dropouts and nothing as in `AttentionLayout`."""

    fc1: tuple[str, ...]
    act: str
    fc2: str
    dropouts: tuple[str, ...] = ()
    nothing: tuple[str, ...] = ()
    refuse: Callable[[nn.Module], str | None] = lambda module: None
    inside: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BlockLayout:
    """A pre-norm block: x + after(attention(norm1(x))), then x + after(mlp(norm2(x))), where after is dropout,
    layer-scale and drop path, those that there are, in this order. layer_scales: modules, or parameters of the block
    itself. mlp: "" where its layers are in several modules of the block. arguments(attention, x, ...) as in
    `AttentionLayout`; attend(attention, x, args, kwargs) calls the attention as the block does; own_way(block) says
    whether it computes something else now. in_tuple: it returns (output,)."""

    norm1: str
    attention: str
    norm2: str
    mlp: str
    arguments: Callable[..., tuple | None]
    layer_scales: tuple[str, ...] = ()
    drop_paths: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    attend: Callable[..., torch.Tensor] = lambda attention, x, args, kwargs: attention(x, *args, **kwargs)
    own_way: Callable[[nn.Module], bool] = lambda block: False
    in_tuple: bool = False


def _timm_arguments(attention, x, attn_mask=None, is_causal=False):
    return attn_mask, is_causal


def _no_arguments(attention, x):
    return None, False


def asks_for_more(others: dict) -> bool:
    """Whether the further arguments of a call of transformers' layers change what it computes."""
    asked = [name for name, value in others.items() if value is not None and value is not False]
    return asked not in ([], ["output_hidden_states"])


def _eva_arguments(attention, x, rope=None, attn_mask=None, is_causal=False):
    if attn_mask is not None and not attention.fused_attn:
        return None  # up to 1.0.19 it meant something else there
    if rope is None:
        return attn_mask, is_causal
    if rope.dim() != 2 or rope.shape[0] != x.shape[1] - attention.num_prefix_tokens:
        return None
    sin, cos = rope.chunk(2, dim=-1)  # of each pair twice
    half = getattr(attention, "rotate_half", False)
    pairs = slice(cos.shape[1] // 2) if half else slice(None, None, 2)
    return attn_mask, is_causal, cos[:, pairs], sin[:, pairs], not half


def _rotary_arguments(attention, hidden_states, attention_mask=None, position_embeddings=None, **others):
    given = _transformers_arguments(attention, hidden_states, attention_mask, **others)
    if given is None or position_embeddings is None:
        return None
    if attention_mask is not None and attention.config._attn_implementation == "eager":
        return None  # of which 4.57 makes factors
    cos, sin = position_embeddings
    if cos.dim() != 2:
        return None
    return *given, *(angle[:, : angle.shape[1] // 2] for angle in (cos, sin)), False


def _without_masks(attention, x, attn_bias=None):
    return (None, False) if attn_bias is None else None


def _transformers_arguments(attention, hidden_states, attention_mask=None, **others):
    if asks_for_more(others):
        return None
    if attention_mask is not None:
        eager = attention.config._attn_implementation == "eager"  # which adds True as 1
        if attention_mask.dim() != 4 or (eager and attention_mask.dtype == torch.bool):
            return None
    return attention_mask, False


def _parts_arguments(attention, hidden_states, head_mask=None, **others):
    return None if head_mask is not None or asks_for_more(others) else (None, False)


def _two_masks_arguments(
    attention, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False
):
    if causal_attention_mask is not None or output_attentions:
        return None
    return _transformers_arguments(attention, hidden_states, attention_mask)


def _multihead_arguments(
    attention,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    plain = query is key is value and key_padding_mask is None and attn_mask is None and not is_causal
    return (None, False) if plain and not need_weights else None


def _timm_scale(attention):
    # Its fused path, SDPA's, goes by the width of a head.
    return (attention.proj.in_features // attention.num_heads) ** -0.5 if attention.fused_attn else attention.scale


def _timm_refuse(attention):
    if getattr(attention, "num_kv_groups", 1) > 1:
        return "several heads of queries share one of keys"
    return None if getattr(attention, "gate", None) is None else "its output is gated"


def _eva_biases(attention):
    return [None] * 3 if attention.q_bias is None else [attention.q_bias, None, attention.v_bias]


def _multihead_refuse(attention):
    plain = attention._qkv_same_embed_dim and attention.bias_k is None and attention.bias_v is None
    return None if plain and attention.batch_first and not attention.add_zero_attn else "it is no plain self-attention"


# What transformers' attention may be set to, all of which compute the same.
_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention",
                    "fastvit")  # fmt: skip


def _transformers_refuse(attention):
    implementation = attention.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        return f"its attn_implementation is {implementation!r}"
    config = attention.config.__dict__
    causal = attention.is_causal is not False or ("vocab_size" in config and "patch_size" not in config)
    return "it is of a model of text, which may attend causally" if causal else None


def _not_eager(attention):
    return attention.config._attn_implementation != "eager"  # which returns the probabilities too


def _leaves_out_samples(block):
    return block.training and block.sample_drop_ratio > 0


def _glu_refuse(mlp):
    return "its gates come last" if mlp.gate_last or mlp.chunk_dim != -1 else None


_TRANSFORMERS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "arguments": _transformers_arguments,
    "refuse": _transformers_refuse,
    "alone": _not_eager,
    "paired": True,
}
_TOWER = {
    **_TRANSFORMERS,
    "proj": "out_proj",
    "heads": "num_heads",
    "scale": lambda attention: attention.scale,
    "rate": "dropout",
}
_EVA = {
    "proj": "proj",
    "heads": "num_heads",
    "arguments": _eva_arguments,
    "scale": _timm_scale,
    "refuse": _timm_refuse,
    "dropouts": ("attn_drop", "proj_drop"),
    "nothing": ("q_norm", "k_norm", "norm"),
}
_EVA_PACKED = AttentionLayout(("qkv",), biases=_eva_biases, **_EVA)
_ROPE_PACKED = AttentionLayout(("qkv",), **_EVA)
_APART = AttentionLayout(("q_proj", "k_proj", "v_proj"), **_EVA)
ATTENTIONS = {
    "timm attention": AttentionLayout(
        ("qkv",),
        "proj",
        "num_heads",
        _timm_arguments,
        _timm_scale,
        _timm_refuse,
        dropouts=("attn_drop", "proj_drop"),
        nothing=("q_norm", "k_norm", "norm"),
    ),
    "timm eva attention": lambda attention: _APART if attention.qkv is None else _EVA_PACKED,
    "timm rope attention": lambda attention: _APART if attention.qkv is None else _ROPE_PACKED,
    "attention without masks": AttentionLayout(
        ("qkv",),
        "proj",
        "num_heads",
        _without_masks,
        lambda attention: attention.scale,
        lambda attention: None,
        dropouts=("attn_drop", "proj_drop"),
    ),
    "multi-head attention": AttentionLayout(
        (),
        "out_proj",
        "num_heads",
        _multihead_arguments,
        lambda attention: attention.head_dim**-0.5,
        _multihead_refuse,
        paired=True,
        rate="dropout",
    ),
    "transformers attention": AttentionLayout(
        proj="o_proj",
        heads="num_attention_heads",
        scale=lambda attention: attention.scaling,
        rate="attention_dropout",
        **_TRANSFORMERS,
    ),
    "transformers rotary attention": AttentionLayout(
        proj="o_proj",
        heads="num_heads",
        scale=lambda attention: attention.scaling,
        rate="dropout",
        **{**_TRANSFORMERS, "arguments": _rotary_arguments},
    ),
    "transformers attention in parts": AttentionLayout(
        ("attention.query", "attention.key", "attention.value"),
        "output.dense",
        "attention.num_attention_heads",
        _parts_arguments,
        lambda attention: attention.attention.scaling,
        lambda attention: _transformers_refuse(attention.attention),
        rate="attention.dropout_prob",
        dropouts=("output.dropout",),
        inside=(("attention", "transformers inner attention"), ("output", "dense and dropout")),
    ),
    "transformers tower attention": AttentionLayout(**_TOWER),
    "transformers tower attention, two masks": AttentionLayout(**{**_TOWER, "arguments": _two_masks_arguments}),
}
MLPS = {
    "timm mlp": MlpLayout(("fc1",), "act", "fc2", ("drop1", "drop2"), ("norm",)),
    "timm packed glu": MlpLayout(("fc1",), "act", "fc2", ("drop1", "drop2"), ("norm",), _glu_refuse),
    "timm swiglu": MlpLayout(("fc1_g", "fc1_x"), "act", "fc2", ("drop1",), ("norm",)),
    "mlp with one dropout": MlpLayout(("fc1",), "act", "fc2", ("drop",)),
    "silu glu": MlpLayout(("w12",), "", "w3"),
    "sequence": MlpLayout(
        ("0",),
        "1",
        "3",
        ("2", "4"),
        refuse=lambda mlp: None if [*mlp._modules] == ["0", "1", "2", "3", "4"] else "it has not five layers",
    ),
    "transformers mlp, up and down": MlpLayout(("up_proj",), "act_fn", "down_proj"),
    "transformers mlp": MlpLayout(("fc1",), "activation_fn", "fc2"),
    "transformers mlp by activation": MlpLayout(("fc1",), "activation", "fc2"),
    "transformers packed glu": MlpLayout(("weights_in",), "", "weights_out"),
    "transformers block in parts": MlpLayout(  # of which the block's own layers are its MLP
        ("intermediate.dense",),
        "intermediate.intermediate_act_fn",
        "output.dense",
        ("output.dropout",),
        inside=(("intermediate", "dense and activation"), ("output", "dense, dropout and residual")),
    ),
    "transformers swiglu": MlpLayout(("gate_proj", "up_proj"), "act_fn", "down_proj"),
}
_SCALED = {
    "norm1": "norm1",
    "attention": "attention",
    "norm2": "norm2",
    "mlp": "mlp",
    "layer_scales": ("layer_scale1", "layer_scale2"),
    "drop_paths": ("drop_path", "drop_path"),
}
BLOCKS = {
    "timm block": BlockLayout(
        "norm1", "attn", "norm2", "mlp", _timm_arguments, ("ls1", "ls2"), ("drop_path1", "drop_path2")
    ),
    "timm eva block": BlockLayout(
        "norm1", "attn", "norm2", "mlp", _eva_arguments, ("gamma_1", "gamma_2"), ("drop_path1", "drop_path2")
    ),
    "dinov2 block": BlockLayout(
        "norm1", "attn", "norm2", "mlp", _no_arguments, ("ls1", "ls2"), own_way=_leaves_out_samples
    ),
    "deit block": BlockLayout("norm1", "attn", "norm2", "mlp", _no_arguments, (), ("drop_path", "drop_path")),
    "deit scaled block": BlockLayout(
        "norm1", "attn", "norm2", "mlp", _no_arguments, ("gamma_1", "gamma_2"), ("drop_path", "drop_path")
    ),
    "torchvision block": BlockLayout(
        "ln_1",
        "self_attention",
        "ln_2",
        "mlp",
        _no_arguments,
        dropouts=("dropout",),
        attend=lambda attention, x, args, kwargs: attention(x, x, x, need_weights=False),
    ),
    "transformers block": BlockLayout(
        "layernorm_before", "attention", "layernorm_after", "mlp", _transformers_arguments, dropouts=("dropout",)
    ),
    "transformers block in parts": BlockLayout(
        "layernorm_before", "attention", "layernorm_after", "", _parts_arguments
    ),
    "transformers scaled block": BlockLayout(arguments=_transformers_arguments, **_SCALED),
    "transformers scaled block in parts": BlockLayout(arguments=_parts_arguments, **_SCALED),
    "transformers rotary block": BlockLayout(arguments=_rotary_arguments, **_SCALED),
    "transformers tower block": BlockLayout("layer_norm1", "self_attn", "layer_norm2", "mlp", _transformers_arguments),
    "transformers tower block in a tuple": BlockLayout(
        "layer_norm1", "self_attn", "layer_norm2", "mlp", _two_masks_arguments, in_tuple=True
    ),
}


def known_layout(layouts: dict, module: nn.Module, cls: type[nn.Module] | None = None):
    """The layout of a module whose class's forward pass is known, or None. cls: the class to go by, if not its own."""
    if type(module) is nn.MultiheadAttention:
        return layouts.get("multi-head attention")
    layout = layouts.get(known_forward(cls or type(module)))
    return layout(module) if callable(layout) else layout


# --------------------------------------------------------------------------------------------------------------------
# The parts


def is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm with weight and bias."""
    plain = type(module) is nn.LayerNorm or (known_forward(type(module)) == "timm layer norm" and not module._fast_norm)
    return plain and module.weight is not None and module.bias is not None


def is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, NonDynamicallyQuantizableLinear)


def is_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity


def is_dropout(module: nn.Module) -> bool:
    return type(module) in (nn.Dropout, nn.Identity)


_GAMMAS = {"layer scale by gamma": "gamma", "layer scale by lambda1": "lambda1"}


def gamma_name(module: nn.Module) -> str | None:
    """The attribute that has a layer-scale's factors; None for a module that is none."""
    return _GAMMAS.get(known_forward(type(module)))


def is_layer_scale(module: nn.Module) -> bool:
    return is_nothing(module) or gamma_name(module) is not None


def _draw(module, x):
    if module.drop_prob == 0 or not module.training:
        return None
    scale = sample_scale(x, module.drop_prob)
    return scale if getattr(module, "scale_by_keep", True) else scale.sign()


def _draw_by_rounding(module, x):
    if module.drop_prob == 0 or not module.training:
        return None
    keep = 1 - module.drop_prob
    return torch.floor(torch.rand(x.shape[0], dtype=x.dtype, device=x.device) + keep).div_(keep)


_DRAWS = {"drop path": _draw, "drop path by rounding": _draw_by_rounding}


def draw_of(module: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor | None] | None:
    """What draws a factor for each sample of x (B, ...) in the stead of a module of drop path, as that draws; None for
    a module that is none."""
    return _DRAWS.get(known_forward(type(module)))


def is_drop_path(module: nn.Module) -> bool:
    return is_nothing(module) or draw_of(module) is not None


def activation_of(module: nn.Module) -> str | None:
    """The name that the ops have for an activation; None for one that they have not."""
    if type(module) in FUSED_ACTIVATION:
        return activation_name(module)
    name = known_forward(type(module))
    if name == "function in act":
        if module.act is F.gelu:
            return "gelu"
        tanh = isinstance(module.act, functools.partial) and module.act.func is F.gelu and not module.act.args
        return "gelu_tanh" if tanh and module.act.keywords == {"approximate": "tanh"} else None
    return name if name in ("gelu", "gelu_tanh", "quick_gelu", "silu") else None
