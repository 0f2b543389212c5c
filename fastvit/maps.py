"""Attention probabilities of a model, worked out in PyTorch beside its forward pass: the kernels never hold any."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import nn

from .dropin.forwards import known_forward
from .dropin.swap import original_class
from .nn.attention import Attention, masks
from .nn.block import block_indices
from .reference.ops import attention_probabilities, rotate


def attention_maps(
    model: nn.Module, images: torch.Tensor, indices: int | Iterable[int] | None = None
) -> list[torch.Tensor]:
    """The attention probabilities (arXiv 1706.03762, eq. 1) of model(images): for each chosen layer, in forward order,
    (B, heads, tokens, tokens) in float32, a row per query, its sum over the keys 1, or 0 where it may attend to none.

    model holds layers of type fastvit.nn.Attention or timm's Attention, alone or in blocks of any kind, and is left as
    it was: it runs in eval mode, without gradients, in its dtype and on its device, where the images have to be; for
    that run its blocks are not fused. Masks that a layer is given count, dropout does not. indices: all layers for
    None, the last n for an int, else layer numbers, negative ones from the end, as `forward_intermediates` has them.

    Raises TypeError for a model that is no module, ValueError for one without such layers or that does not run each of
    them once, and both as `block_indices` says; what the model raises for the images passes through.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    layers = [module for module in model.modules() if _is_known(original_class(module) or type(module))]
    if not layers:
        raise ValueError(f"model, a {type(model).__name__}, has no attention layers of fastvit's or timm's")
    chosen = [layers[index] for index in sorted(set(block_indices(indices, len(layers))))]

    given, maps = {}, []

    def note_options(layer, args, kwargs):
        given[layer] = _options_given(*args[1:], **kwargs)

    with ExitStack() as undo:
        if "torch._dynamo" in sys.modules:  # a compiled model does not look for new hooks
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for layer in chosen:

            def note_map(_, __, packed, layer=layer):
                maps.append(_probabilities(layer, packed, *given[layer]))

            undo.enter_context(layer.register_forward_pre_hook(note_options, with_kwargs=True))
            undo.enter_context(layer.qkv.register_forward_hook(note_map))
        model.eval()
        with torch.no_grad():
            model(images)
    if len(maps) != len(chosen):
        raise ValueError(f"model ran {len(maps)} attention layers, expected each of the {len(chosen)} chosen ones once")
    return maps


def _is_known(cls: type[nn.Module]) -> bool:
    return cls is Attention or known_forward(cls) == "timm attention"


def _options_given(attn_mask=None, is_causal=False, rope=None, **_):
    return attn_mask, is_causal, rope


def _probabilities(layer: nn.Module, packed: torch.Tensor, attn_mask, is_causal: bool, rope) -> torch.Tensor:
    """softmax(q k^T * scale + mask) of a layer and its packed rows (B, N, 3 * H * d), as (B, H, N, N) in float32; q and
    k rotated where it has a rope."""
    batch, tokens, _ = packed.shape
    q, k, _ = packed.unflatten(2, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    if hasattr(layer, "q_norm"):  # timm's
        q, k = layer.q_norm(q), layer.k_norm(k)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    key_padding_mask, attn_bias = masks(attn_mask, is_causal, batch, layer.num_heads, tokens, packed)
    with torch.autocast(packed.device.type, enabled=False):
        bias = attn_bias if attn_bias is None else attn_bias.float()
        return attention_probabilities(q.float(), k.float(), layer.scale, key_padding_mask, bias)
