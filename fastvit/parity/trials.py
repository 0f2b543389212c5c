"""Why a layer departs: what could be the cause is tried on a copy, in float64, and what difference is left measured."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastvit.dropin.layouts import (
    ATTENTIONS,
    MLPS,
    AttentionLayout,
    activation_of,
    gamma_name,
    known_layout,
)
from fastvit.dropin.swap import original_class
from fastvit.models.config import POS_RESAMPLING
from fastvit.models.weights import resample_position_table
from fastvit.nn import Attention
from fastvit.nn.layers import ACTIVATION_LAYERS, submodules
from fastvit.nn.mlp import Mlp, SwiGLU

from .trace import Layer, Trace, run

ENOUGH = 0.9  # of the squared difference, to be called the cause
_GELU = {"gelu": "exact GELU", "gelu_tanh": "tanh GELU", "quick_gelu": "quick GELU", "silu": "SiLU"}
# Statistics that images are normalised by, in ViTs' training: mean and std of each channel.
STATISTICS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": ((0.5,) * 3, (0.5,) * 3),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "0 and 1": ((0.0,) * 3, (1.0,) * 3),
}


@dataclass(frozen=True)
class Context:
    """Both models in float64: their runs, their layers; the images; model_b."""

    a: Trace
    b: Trace
    layers_a: list[Layer]
    layers_b: list[Layer]
    images: torch.Tensor
    model_b: nn.Module


Trial = tuple[str, Callable[[], torch.Tensor]]


def diagnose(name: str, context: Context) -> tuple[str, float]:
    """What explains that model_b's layer `name` departs from model_a's, in a sentence, and how much of the difference
    that is: 1 is all."""
    if name == "tokens":
        return _best("tokens", context.a.tokens, context.b.tokens, _of_tokens(context))
    if name == "output":
        return "output: what comes after the last block differs (a norm, pooling or the head)", 0.0
    mine, theirs = ({layer.name: layer for layer in layers}[name] for layers in (context.layers_a, context.layers_b))
    call = context.a.calls[name]
    with torch.no_grad():
        now = context.b.calls[name].again(theirs.module, call.read)
    found = _TRIALS[mine.kind](mine, theirs, context)
    return _best(name, call.out, now, found)


def _best(name: str, wanted: torch.Tensor, now: torch.Tensor, found: Iterator[Trial]) -> tuple[str, float]:
    """Of the trials the one that leaves least, of equal ones the first."""
    before = (now - wanted).norm()
    best, most = "nothing that was tried explains it", 0.0
    for what, attempt in found:
        with torch.no_grad():
            got = attempt()
        explained = 0.0
        if got.shape == wanted.shape:
            left = (got - wanted).norm()
            # Of NaN nothing is explained but by having none.
            explained = 1 - (left / before).item() ** 2 if before.isfinite() else float(left <= 1e-6 * wanted.norm())
        if explained > most + 1e-6:
            best, most = what, explained
    if most < ENOUGH:
        tail = f"; nearest was {best}, with {most:.0%}" if most > 0.1 else ""
        return f"{name}: nothing that was tried explains the difference{tail}", most
    return f"{name}: {best} explains {_percent(most)} of the difference", most


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.9995 else "all"


def _trial(layer: Layer, context: Context, change: Callable[[nn.Module], None]) -> Callable[[], torch.Tensor]:
    """What model_b's layer, changed, returns for what model_a's read."""

    def attempt() -> torch.Tensor:
        changed = copy.deepcopy(layer.module)
        change(changed)
        return context.b.calls[layer.name].again(changed, context.a.calls[layer.name].read)

    return attempt


# ---------------------------------------------------------------------------------------------------------------------
# By the kind of layer


def _of_norm(mine: Layer, theirs: Layer, context: Context) -> Iterator[Trial]:
    known = {getattr(mine.module, "eps", None): None, 1e-12: None, 1e-6: None, 1e-5: None}
    own = getattr(theirs.module, "eps", None)
    for eps in known:
        if None not in (eps, own) and eps != own:
            yield f"eps {own:g} against {eps:g}", _trial(theirs, context, lambda norm, eps=eps: _set_eps(norm, eps))
    yield from _of_weights(mine, theirs, context)


def _set_eps(norm: nn.Module, eps: float) -> None:
    norm.eps = eps


def _of_mlp(mine: Layer, theirs: Layer, context: Context) -> Iterator[Trial]:
    found = {name: activation_of(module) for name, module in theirs.module.named_modules()}
    for name, own in found.items():
        for other, build in ACTIVATION_LAYERS.items():
            if own is not None and other != own:
                what = f"{_GELU[own]} against {_GELU[other]}"
                yield what, _trial(theirs, context, lambda mlp, n=name, build=build: mlp.set_submodule(n, build()))
    yield from _of_weights(mine, theirs, context)


def _attention_layout(module: nn.Module) -> AttentionLayout | None:
    if isinstance(module, Attention):
        return ATTENTIONS["timm attention"]
    return known_layout(ATTENTIONS, module, original_class(module))


def _packed(attention: nn.Module, layout: AttentionLayout) -> list[list[torch.Tensor]]:
    """Views of the rows of q, of k and of v, weight and bias."""
    if not layout.qkv:
        tensors = [attention.in_proj_weight, attention.in_proj_bias]
    elif len(layout.qkv) == 1:
        qkv = attention.get_submodule(layout.qkv[0])
        tensors = [qkv.weight, qkv.bias]
    else:
        layers = submodules(attention, layout.qkv)
        return [[t.data for t in (layer.weight, layer.bias) if t is not None] for layer in layers]
    parts = [tensor.data.chunk(3) for tensor in tensors if tensor is not None]
    biases = [None] * 3 if layout.biases is None else layout.biases(attention)
    return [
        [*rows, *([] if bias is None else [bias.data])]
        for rows, bias in zip(zip(*parts, strict=True), biases, strict=True)
    ]


def _reorder(attention: nn.Module, layout: AttentionLayout, order: tuple[int, ...]) -> None:
    parts = _packed(attention, layout)
    copies = [[rows.clone() for rows in part] for part in parts]
    for place, source in enumerate(order):
        for rows, other in zip(parts[place], copies[source], strict=False):  # k may have no bias
            rows.copy_(other)


def _by_head(attention: nn.Module, layout: AttentionLayout) -> None:
    """As if the rows of q, k and v came head by head."""
    heads, parts = layout.num_heads(attention), _packed(attention, layout)
    for tensors in zip(*parts, strict=False):
        rows = torch.cat(tensors)
        found = rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).chunk(3)
        for tensor, value in zip(tensors, [value.clone() for value in found], strict=True):
            tensor.copy_(value)


def _of_attention(mine: Layer, theirs: Layer, context: Context) -> Iterator[Trial]:
    layout = _attention_layout(theirs.module)
    if layout is not None:
        for order in list(itertools.permutations(range(3)))[1:]:
            named = ", ".join("qkv"[part] for part in order)

            def change(attention, order=order):
                _reorder(attention, layout, order)

            yield f"rows in the order q, k, v against {named}", _trial(theirs, context, change)
        yield "q, k and v of all heads against head by head", _trial(theirs, context, lambda m: _by_head(m, layout))
        other = _attention_layout(mine.module)
        heads = layout.num_heads(theirs.module), other and other.num_heads(mine.module)
        if heads[1] and heads[0] != heads[1]:

            def regroup(attention):
                width = layout.num_heads(attention) * layout.scale(attention) ** -2
                where, _, own = layout.heads.rpartition(".")
                module = attention.get_submodule(where)
                for names, value in _of_heads(own, heads[1], width):
                    for name in [name for name in names if hasattr(module, name)]:
                        setattr(module, name, value)

            yield f"{heads[0]} heads against {heads[1]}", _trial(theirs, context, regroup)
    yield from _of_weights(mine, theirs, context)


def _of_heads(own: str, heads: int, width: float) -> list[tuple[tuple[str, ...], float]]:
    """What depends on the number of heads, by the names that libraries have for it."""
    head_dim = round(width / heads)
    return [
        ((own,), heads),
        (("head_dim", "attention_head_size"), head_dim),
        (("scale", "scaling"), head_dim**-0.5),
    ]


def _named_parts(layer: Layer) -> dict[str, list[torch.Tensor]]:
    """The parameters of a layer by what they are, whatever the library calls them and however it packs q, k and v."""
    module = layer.module
    if layer.kind == "norm":
        return {name: [p.data] for name, p in module.named_parameters()}
    if layer.kind == "attention":
        layout = _attention_layout(module)
        if layout is None:
            return {}
        proj = module.get_submodule(layout.proj)
        found = {f"of {'qkv'[i]}": part for i, part in enumerate(_packed(module, layout))}
        return found | {"of the projection": [t.data for t in (proj.weight, proj.bias) if t is not None]}
    if layer.kind == "mlp":
        ours = {Mlp: "timm mlp", SwiGLU: "timm packed glu"}.get(type(module))
        layout = MLPS[ours] if ours else known_layout(MLPS, module, original_class(module))
        if layout is None:
            return {}
        *first, second = submodules(module, (*layout.fc1, layout.fc2))
        tensors = [t for layer in first for t in (layer.weight, layer.bias)]
        found = {"of the first layer": [t.data for t in tensors if t is not None]}
        return found | {"of the second layer": [t.data for t in (second.weight, second.bias) if t is not None]}
    return {}


def _of_weights(mine: Layer, theirs: Layer, context: Context) -> Iterator[Trial]:
    """model_a's weights in model_b's layer, of those parts that differ."""
    wanted, own = _named_parts(mine), _named_parts(theirs)
    differing = [
        name
        for name in own
        if name in wanted
        and len(own[name]) == len(wanted[name])
        and all(t.shape == o.shape for t, o in zip(own[name], wanted[name], strict=True))
        and any(not torch.equal(t, o) for t, o in zip(own[name], wanted[name], strict=True))
    ]
    if differing and set(wanted) == set(own):
        names = ", ".join(differing)

        def take(module):
            parts = _named_parts(replace(theirs, module=module))
            for name in differing:
                for tensor, value in zip(parts[name], wanted[name], strict=True):
                    tensor.copy_(value)

        yield f"other weights ({names})", _trial(theirs, context, take)


def _of_block(mine: Layer, theirs: Layer, context: Context) -> Iterator[Trial]:
    """Its parts agree: what is around them does not."""
    if mine.layout is None or theirs.layout is None or not mine.layout.mlp:
        return
    x = context.a.calls[mine.name].read
    parts = [context.a.calls[f"{mine.name} {part}"].out for part in ("attention", "mlp")]
    a, b = (_gammas(layer) for layer in (mine, theirs))
    plain = [1.0, 1.0]
    attention, mlp = parts
    for what, (first, second) in (
        ("model_a's layer-scale, where model_b has none,", a if b == [None, None] else [None, None]),
        ("no layer-scale, where model_b has one,", plain if a == [None, None] else [None, None]),
        ("another layer-scale", a),
    ):
        if first is not None and second is not None:
            yield what, lambda f=first, s=second: (x + f * attention) + s * mlp


def _gammas(block: Layer) -> list[torch.Tensor | None]:
    """The factors of a block's two layer-scales, None where it has none."""
    found = []
    for name in block.layout.layer_scales or (None, None):
        module, own = block.module._modules.get(name), block.module._parameters.get(name)
        attribute = None if module is None else gamma_name(module) or ("gamma" if hasattr(module, "gamma") else None)
        gamma = own if attribute is None else getattr(module, attribute)
        found.append(None if gamma is None else gamma.data)
    return found


def _of_tokens(context: Context) -> Iterator[Trial]:
    a, b = context.a.tokens, context.b.tokens
    channels = context.images.shape[1]
    if channels == 3:
        for (mine, (mean, std)), (theirs, (other_mean, other_std)) in itertools.permutations(STATISTICS.items(), 2):

            def renormalised(mean=mean, std=std, other_mean=other_mean, other_std=other_std):
                to = [torch.tensor(v, dtype=a.dtype, device=a.device)[:, None, None] for v in (mean, std)]
                by = [torch.tensor(v, dtype=a.dtype, device=a.device)[:, None, None] for v in (other_mean, other_std)]
                images = (context.images * by[1] + by[0] - to[0]) / to[1]
                return run(context.model_b, context.layers_b, images).tokens

            yield f"images normalised by {theirs} against {mine} statistics", renormalised
    if len(a) > 1:
        same = (a - b).mean(dim=0)
        for mine, theirs, offset in _resamplings(context):
            yield f"a position table resampled by {theirs!r} against {mine!r}", lambda offset=offset: b + offset
        rows = (same.norm(dim=-1) > 1e-12 * a.norm(dim=-1).mean()).nonzero().flatten().tolist()
        few = len(rows) < a.shape[1] // 2
        which = f"to token{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:8]))}" if few else "to the patches"
        yield (
            f"what is added {which} of every image alike: another position table (of other weights, or resampled by "
            "another policy, as with and without antialiasing), or other class and register tokens,",
            lambda: b + same,
        )


def _resamplings(context: Context) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(policy of model_a, policy of model_b, what the first adds to the second) where model_b has a square position
    table of another grid than the images'."""
    tokens = context.b.tokens.shape[1]
    for name, table in context.model_b.named_parameters():
        if "pos" not in name or table.dim() != 3 or table.shape[0] != 1 or table.shape[1] == tokens:
            continue
        for prefix in range(8):
            old, new = (math.isqrt(rows - prefix) for rows in (table.shape[1], tokens))
            if (old**2, new**2) == (table.shape[1] - prefix, tokens - prefix):
                tables = {
                    policy: resample_position_table(table.data, (old, old), (new, new), prefix, policy).to(table)
                    for policy in POS_RESAMPLING
                }
                for mine, theirs in itertools.permutations(tables, 2):
                    yield mine, theirs, tables[mine] - tables[theirs]


_TRIALS = {"norm": _of_norm, "mlp": _of_mlp, "attention": _of_attention, "block": _of_block}
