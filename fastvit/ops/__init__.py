"""The ops: functional forms, autograd Functions, and torch custom ops (`torch.ops.fastvit.*`).

Each functional form checks its arguments, asks `fastvit.dispatch` for a back end and runs there. On the kernels it goes
through an autograd Function whose forward and backward call custom ops, so that it compiles, exports and
differentiates.
"""

import inspect

from . import attention as _attention
from . import layer_norm as _layer_norm
from . import layer_norm_linear as _layer_norm_linear
from . import layer_norm_mlp as _layer_norm_mlp
from . import linear_residual as _linear_residual
from . import patch_embed as _patch_embed

_MODULES = {
    module.OP.name: module
    for module in (_attention, _layer_norm, _layer_norm_linear, _layer_norm_mlp, _linear_residual, _patch_embed)
}

AttentionFunction = _attention.AttentionFunction
LayerNormFunction = _layer_norm.LayerNormFunction
LayerNormLinearFunction = _layer_norm_linear.LayerNormLinearFunction
LayerNormMLPFunction = _layer_norm_mlp.LayerNormMLPFunction
LinearResidualFunction = _linear_residual.LinearResidualFunction
PatchEmbedFunction = _patch_embed.PatchEmbedFunction

attention = _attention.attention
layer_norm = _layer_norm.layer_norm
layer_norm_linear = _layer_norm_linear.layer_norm_linear
layer_norm_mlp = _layer_norm_mlp.layer_norm_mlp
linear_residual = _linear_residual.linear_residual
patch_embed = _patch_embed.patch_embed


def _positional(name: str, args, kwargs) -> tuple:
    """The arguments of op `name` as its `_common.Op` takes them: all, in order."""
    bound = inspect.signature(getattr(_MODULES[name], name)).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def explain(name: str, *args, **kwargs):
    """What `fastvit.explain` says of op `name` with the op's own arguments."""
    return _MODULES[name].OP.explain(*_positional(name, args, kwargs))


def run_candidate(name: str, candidate: str, *args, **kwargs):
    """Op `name` by one of the candidates that `explain` may name, whatever the back end asked for."""
    op, given = _MODULES[name].OP, _positional(name, args, kwargs)
    op.check(*given)
    return op.candidates(given)[candidate](*given)


OPS = tuple(sorted(_MODULES))

__all__ = [
    "AttentionFunction",
    "LayerNormFunction",
    "LayerNormLinearFunction",
    "LayerNormMLPFunction",
    "LinearResidualFunction",
    "PatchEmbedFunction",
    *OPS,
]
