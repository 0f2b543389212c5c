"""The ops: functional forms, autograd Functions, and operators of torch (`torch.ops.fastvit.*`).

Each functional form has `fastvit.dispatch` choose what runs the call. On the kernels that is an autograd Function,
whose forward and backward launch straight, or call operators of torch where something traces, so that it compiles,
exports and differentiates.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

import torch

from fastvit import dispatch

from . import _common
from .attention import AttentionFunction, attention, attention_varlen
from .layer_norm import LayerNormFunction, layer_norm
from .layer_norm_linear import LayerNormLinearFunction, layer_norm_linear
from .layer_norm_mlp import LayerNormMLPFunction, layer_norm_mlp
from .linear_residual import LinearResidualFunction, linear_residual
from .patch_embed import PatchEmbedFunction, patch_embed
from .transformer_block import (
    TransformerBlockFunction,
    carrying,
    run_transformer_block,
    takes_block,
    transformer_block,
)

OPS = tuple(sorted(dispatch.OPS))


def _bound(name: str, args: tuple, kwargs: dict) -> tuple[dispatch.Op, tuple]:
    """Op `name`, and the arguments as it takes them: all, in its order."""
    op = dispatch.OPS[name]
    bound = inspect.signature(globals()[name]).bind(*args, **kwargs)
    bound.apply_defaults()
    return op, tuple(bound.arguments[parameter] for parameter in op.parameters)


def explain(op: str, *args, **kwargs) -> dispatch.Explanation:
    """The back end that `fastvit.ops.<op>(*args, **kwargs)` would run on, and every reason why not another. A backward
    pass with create_graph=True, or with a batch of upstream gradients, is PyTorch's whatever the forward pass was (of
    the kernels' dropout there is none). On the kernels also every launch, forward and backward, with what was chosen
    for it.

    Raises ValueError for an unknown op, and whatever the op itself raises for bad arguments; launches nothing.
    """
    if op not in dispatch.OPS:
        raise ValueError(f"explain: unknown op {op!r}, expected one of {', '.join(OPS)}")
    found, given = _bound(op, args, kwargs)
    explanation = found.explain(*given)
    if explanation.candidate != dispatch.KERNELS:
        return explanation
    return replace(explanation, launches=_common.launches(found, given))


def run_candidate(name: str, candidate: str, *args, **kwargs) -> torch.Tensor:
    """Op `name` by one of the candidates that `explain` may name, whatever the back end asked for."""
    op, given = _bound(name, args, kwargs)
    op.check(*given)
    return op.candidates(given)[candidate](*given)


def _tune(op: dispatch.Op, args: tuple) -> None:
    importlib.import_module("fastvit.tune").tune_missing(op, args)


dispatch.set_tuner(_tune)

__all__ = [
    "AttentionFunction",
    "LayerNormFunction",
    "LayerNormLinearFunction",
    "LayerNormMLPFunction",
    "LinearResidualFunction",
    "PatchEmbedFunction",
    "TransformerBlockFunction",
    "attention",
    "attention_varlen",
    "carrying",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear_residual",
    "patch_embed",
    "run_transformer_block",
    "takes_block",
    "transformer_block",
]
