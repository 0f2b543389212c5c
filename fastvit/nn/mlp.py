"""The MLP branch: plain, gated, and as one pre-norm module."""

from __future__ import annotations

import torch
from torch import nn

from fastvit import ops

from .layers import (
    DROP_PATH,
    DROPOUT,
    FUSED_ACTIVATION,
    LAYER_NORM,
    LAYER_SCALE,
    LINEAR,
    DropPath,
    LayerScale,
    activation_name,
    branch_scales,
    build_layer_norm,
    can_fuse,
    check_input,
    check_layer,
    check_positive,
    check_rate,
    dropout_active,
    norm_complete,
    refuse_scripting,
    submodules,
    traced,
    vit_layer_norm,
    weights,
)


def _each(value) -> tuple:
    """One value for both layers, or the pair that it is, as timm's layers take it."""
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)


class _TwoLayers(nn.Module):
    """What Mlp and SwiGLU share: two linear layers with an activation and dropout between and after them."""

    packed = 1  # how many rows of fc1 go into one of fc2's inputs

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer=nn.GELU,
        norm_layer=None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if norm_layer is not None:
            raise ValueError(f"norm_layer is {norm_layer}, but fastvit's MLP supports only norm_layer=None")
        check_positive("in_features", in_features)
        hidden_features = in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        check_positive("hidden_features", hidden_features)
        check_positive("out_features", out_features)
        if hidden_features % self.packed:
            raise ValueError(f"hidden_features is {hidden_features}, expected a multiple of {self.packed}")
        (bias1, bias2), (rate1, rate2) = _each(bias), _each(drop)
        check_rate("drop", rate1)
        check_rate("drop", rate2)
        check_layer("act_layer", act_layer, "torch.nn.GELU")
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(rate1)
        self.fc2 = nn.Linear(hidden_features // self.packed, out_features, bias=bias2, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(rate2)

    def can_fuse(self) -> bool:
        """Whether ops may take the place of the two linear layers, and nobody can tell."""
        layers = submodules(self, _LAYERS)
        return can_fuse(layers, _ROLES) and not (dropout_active(layers[2]) or dropout_active(layers[3]))


_LAYERS = ("fc1", "fc2", "drop1", "drop2")
_ROLES = (LINEAR, LINEAR, DROPOUT, DROPOUT)


class Mlp(_TwoLayers):
    """fc2(act(fc1(x))) with dropout after each layer, a drop-in for timm's `Mlp`. x (..., in_features).

    Parameters: fc1.weight (hidden_features, in_features), fc2.weight (out_features, hidden_features), and biases.
    bias and drop are for both layers, or a pair. Raises ValueError for sizes and rates that are none and for a
    norm_layer, which it has not, TypeError for an act_layer that is no class.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))

    def can_fuse(self) -> bool:
        return super().can_fuse() and can_fuse(submodules(self, ("act",)), (FUSED_ACTIVATION,))


class SwiGLU(_TwoLayers):
    """fc2(act(gate) * value), fc1(x) being [gate; value] (arXiv 2002.05202), a drop-in for timm's `SwiGLUPacked`.

    Parameters: fc1.weight (hidden_features, in_features), fc2.weight (out_features, hidden_features / 2), and biases.
    bias and drop are for both layers, or a pair. Raises as Mlp, and ValueError for an odd hidden_features.
    """

    packed = 2

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer=nn.SiLU,
        **kwargs,
    ):
        super().__init__(in_features, hidden_features, out_features, act_layer, **kwargs)

    def init_weights(self) -> None:
        """Start as the identity of gating, as timm does: values of 1 whatever the input."""
        rows = self.fc1.out_features // 2
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias[rows:])
        nn.init.normal_(self.fc1.weight[rows:], std=1e-6)

    def gate(self, packed: torch.Tensor) -> torch.Tensor:
        """act(gate) * value of fc1's output (..., hidden_features) -> (..., hidden_features / 2)."""
        gate, value = packed.chunk(2, dim=-1)
        return self.act(gate) * value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self.drop2(self.fc2(self.drop1(self.gate(self.fc1(x)))))


class LayerNormMLP(nn.Module):
    """A whole pre-norm MLP branch, x + drop_path(ls(fc2(act(fc1(norm(x)))))) (arXiv 2010.11929, eq. 3), as one op.

    Parameters: norm.weight, norm.bias (D,); fc1.weight (hidden_features, D), fc2.weight (D, hidden_features) and,
    with `bias`, their biases; ls.gamma (D,) where init_values, its first value, is given.
    hidden_features defaults to 4 * dim. act_layer: nn.GELU (exact by default), nn.SiLU, fastvit.nn.QuickGELU are
    fused, any other runs unfused. residual=False leaves out the sum and returns the branch alone. Raises ValueError for
    sizes and rates that are none, TypeError for layers that are no classes.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        hidden_features: int | None = None,
        act_layer=nn.GELU,
        norm_layer=vit_layer_norm,
        bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.0,
        residual: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_positive("dim", dim)
        hidden_features = 4 * dim if hidden_features is None else hidden_features
        check_positive("hidden_features", hidden_features)
        check_rate("drop_path", drop_path)
        check_layer("act_layer", act_layer, "torch.nn.GELU")
        self.dim = dim
        self.residual = residual
        self.norm = build_layer_norm(norm_layer, dim, **dd)
        self.fc1 = nn.Linear(dim, hidden_features, bias=bias, **dd)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, dim, bias=bias, **dd)
        self.ls = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def can_fuse(self) -> bool:
        """Whether one op gives what calling the submodules would."""
        modules = (self.norm, self.fc1, self.act, self.fc2, self.ls, self.drop_path)
        roles = (LAYER_NORM, LINEAR, FUSED_ACTIVATION, LINEAR, LAYER_SCALE, DROP_PATH)
        return can_fuse(modules, roles) and norm_complete(self.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, ..., D) -> (B, ..., D). Raises ValueError for another width, TypeError for another dtype."""
        tracing = traced(x)
        if not tracing:
            check_input(x, self.dim, "...")
        if tracing or not self.can_fuse():
            branch = self.drop_path(self.ls(self.fc2(self.act(self.fc1(self.norm(x))))))
            return x + branch if self.residual else branch
        return ops.layer_norm_mlp(
            x,
            *weights(self.norm, self.fc1, self.fc2),
            eps=self.norm.eps,
            activation=activation_name(self.act),
            residual=x if self.residual else None,
            **branch_scales(self.ls, self.drop_path, x),
        )
