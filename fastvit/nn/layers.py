"""Small layers of the residual branches, the one predicate that says when a fused op may stand in for modules, and the
checks that modules share."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import partial
from numbers import Integral, Real

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def submodules(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """A module's submodules of these names, which it has, deeper ones by dots, itself for "": as many of nn.Module's
    own attribute accesses would cost more than the checks that they are for."""
    own = module._modules
    return [own[name] if name in own else _deeper(module, name) for name in names]


def _deeper(module: nn.Module, name: str) -> nn.Module:
    for part in name.split(".") if name else ():
        module = module._modules[part]
    return module


def can_fuse(modules: Iterable[nn.Module], roles: Iterable[tuple[type, ...]]) -> bool:
    """Whether a fused op may use the parameters of all these modules without calling any, and nobody can tell.

    Each module must be exactly of one of the types of its role, not a subclass or a stand-in (an adapter, a quantised
    or parametrised layer); no forward or backward hook may wait on it or on all modules; and its `forward` must be its
    class's own. A LayerNorm must have weight and bias, and dropout that is active would also be missed: see
    `norm_complete` and `dropout_active`.
    """
    if _has_any_global_hook():
        return False
    for module, types in zip(modules, roles, strict=True):
        own = module.__dict__
        if (
            type(module) not in types
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or ("forward" in own and not forward_is_its_classes(module))
        ):
            return False
    return True


def forward_is_its_classes(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's `forward`, and not another that was put into the module itself.
    What transformers 4 puts back there once it has recorded a layer's outputs is the class's."""
    own = module.__dict__.get("forward")
    return own is None or (getattr(own, "__self__", None) is module and own.__func__ is type(module).forward)


def traced(x) -> bool:
    """Whether x is torch.fx's stand-in for a tensor: it has no values to check, and only calls of modules, of torch and
    of functions under `torch.fx.wrap` can be recorded with it."""
    return isinstance(x, torch.fx.Proxy)


def refuse_scripting(module: nn.Module):
    """The `__prepare_scriptable__` of modules that cannot be scripted. Raises RuntimeError."""
    # A trace of the kernels would run, but cannot be saved: their autograd.Functions are Python.
    raise RuntimeError(
        f"torch.jit.script cannot compile fastvit.nn.{type(module).__name__}, which chooses its kernels as it runs: "
        "use torch.compile, torch.export.export, or torch.jit.trace under fastvit.use_backend('torch')"
    )


def is_integer(value) -> bool:
    """Whether it is an integer, Python's or numpy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether it is a finite real number and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(name: str, value) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")


def check_rate(name: str, value) -> None:
    """Raise ValueError unless `value` is a probability."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, expected a number from 0 to 1")


def check_input(x: torch.Tensor, dim: int, tokens: str = "tokens") -> None:
    """Raise TypeError unless x is a floating-point tensor, ValueError unless its shape is (batch, tokens, dim), or with
    "..." for tokens (batch, ..., dim)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a torch.Tensor (batch, {tokens}, {dim})")
    if x.dim() < 2 or (x.dim() != 3 and tokens != "...") or x.shape[-1] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, {tokens}, {dim})")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected floating point")


def dropout_active(dropout: nn.Dropout) -> bool:
    """Whether calling `dropout` would change its input."""
    return dropout.training and dropout.p > 0


def norm_complete(norm: nn.LayerNorm) -> bool:
    """Whether a LayerNorm has both a weight and a bias, as the fused ops do."""
    return norm.elementwise_affine and norm._parameters.get("bias") is not None


def timm_layer(name: str):
    """timm's own layer of that name, or None when nobody has imported timm."""
    return getattr(sys.modules.get("timm.layers"), name, None)


# torch's LayerNorm with the eps of the ViT family; torch's own default is 1e-5.
vit_layer_norm = partial(nn.LayerNorm, eps=1e-6)


def check_layer(name: str, layer, example: str) -> None:
    """Raise TypeError unless `layer` is something that builds a module: a class, or a partial or function."""
    if not callable(layer) or isinstance(layer, nn.Module):
        raise TypeError(f"{name} is {layer!r}, expected a class such as {example}")


def build_layer_norm(norm_layer, dim: int, device=None, dtype=None) -> nn.LayerNorm:
    """The LayerNorm that `norm_layer(dim)` describes. Raises TypeError for any other kind of normalisation."""
    check_layer("norm_layer", norm_layer, "torch.nn.LayerNorm")
    norm = norm_layer(dim, device=device, dtype=dtype)
    if type(norm) not in (nn.LayerNorm, timm_layer("LayerNorm")) or norm.weight is None or norm.bias is None:
        raise TypeError(f"norm_layer builds {norm}, expected a torch or timm LayerNorm with weight and bias")
    # timm's LayerNorm is torch's with another default eps; as torch's own type the fused ops may take its place.
    return nn.LayerNorm(dim, eps=norm.eps, device=device, dtype=dtype)


class LayerScale(nn.Module):
    """x * gamma, one learned factor per channel, `init_values` at first (arXiv 2103.17239). x (..., D).

    Raises ValueError for a dim that is no positive integer and init_values that are no finite number.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None):
        super().__init__()
        check_positive("dim", dim)
        if not is_number(init_values):
            raise ValueError(f"init_values is {init_values!r}, expected a finite number")
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"{self.gamma.shape[0]}, init_values={self.init_values}"


def sample_scale(x: torch.Tensor, drop_prob: float) -> torch.Tensor:
    """A draw for each sample of x (B, ...), 0 with probability `drop_prob` and else 1 / (1 - drop_prob): (B,)."""
    keep_prob = 1 - drop_prob
    scale = x.new_empty(x.shape[0]).bernoulli_(keep_prob)
    return scale.div_(keep_prob) if keep_prob > 0 else scale


@torch.fx.wrap
def drop_path(x: torch.Tensor, drop_prob: float) -> torch.Tensor:
    """x (B, ...) by `sample_scale`."""
    return x * sample_scale(x, drop_prob).reshape(-1, *[1] * (x.dim() - 1))


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a whole sample with probability `drop_prob` and divide the kept ones by
    1 - drop_prob (arXiv 1603.09382). x (B, ...). Raises ValueError for a probability outside [0, 1]."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        check_rate("drop_prob", drop_prob)
        self.drop_prob = drop_prob

    def sample_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """A draw of the factor of each sample, (B,) in x's dtype, or None where `forward` changes nothing."""
        return sample_scale(x, self.drop_prob) if self.training and self.drop_prob > 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return drop_path(x, self.drop_prob) if self.training and self.drop_prob > 0 else x

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


@torch.no_grad()
def init_normal(tensor: torch.Tensor, std: float = 0.02) -> torch.Tensor:
    """Fill `tensor` with normal numbers, cut at 2."""
    # By inverting the distribution function, which takes one draw an element: torch's own trunc_normal_ draws
    # differently from release to release, and a seed should mean the same weights in all of them and in timm.
    # In 16 bits one draw in 500 would be rounded to 1 or -1, which is infinitely far out: those are drawn in float32.
    wide = tensor if tensor.dtype.itemsize > 2 else torch.empty_like(tensor, dtype=torch.float32)
    within = math.erf(2 / (std * math.sqrt(2)))
    return tensor.copy_(wide.uniform_(-within, within).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2, 2))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP (arXiv 2103.00020)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


# The activations that a fused MLP knows, by the name that `fastvit.ops.layer_norm_mlp` has for them.
ACTIVATION_LAYERS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}


def activation_name(module: nn.Module) -> str:
    """The key of ACTIVATION_LAYERS for a module of one of the types in FUSED_ACTIVATION."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "silu" if type(module) is nn.SiLU else "quick_gelu"


# The types that modules may have in the roles that `can_fuse` judges.
LINEAR = (nn.Linear,)
LAYER_NORM = (nn.LayerNorm,)
DROPOUT = (nn.Dropout,)
FUSED_ACTIVATION = (nn.GELU, nn.SiLU, QuickGELU)
LAYER_SCALE = (LayerScale, nn.Identity)
DROP_PATH = (DropPath, nn.Identity)


def weights(*modules: nn.Module) -> list[torch.Tensor | None]:
    """The weight and the bias of each module, as fused ops take them one after the other; looked up where nn.Module
    keeps them, as `submodules` does."""
    found: list[torch.Tensor | None] = []
    for module in modules:
        own = module._parameters
        found += (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (module.weight, module.bias)
    return found


def branch_scales(layer_scale: nn.Module, drop_path: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """What a fused op takes in place of the two modules that end a residual branch: gamma, and a draw per sample."""
    return {
        "layer_scale": layer_scale.gamma if type(layer_scale) is LayerScale else None,
        "drop_path_scale": drop_path.sample_scale(x) if type(drop_path) is DropPath else None,
    }
