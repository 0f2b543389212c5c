"""attorch (github.com/BobMcDear/attorch), modules on Triton kernels, with the op's own tensors in the place of their
parameters.

Written from its documented signatures and tested against stand-ins that have them: never run with the package, which
needs a GPU. Its attention module holds both projections as well, so that it is no counterpart of the op.
"""

from __future__ import annotations

from torch.func import functional_call

from . import Built
from ._common import add_residual, check_known

_ACTIVATIONS = ("gelu", "silu")
_NOTE = "host time includes placing the weights in the modules"


def unfit(peer, case, config, device) -> str | None:
    return _lacks(config.activation) if case.op == "layer_norm_mlp" else None


def _lacks(activation: str) -> str | None:
    return None if activation in _ACTIVATIONS else f"has no {activation}"


def build(peer, case, ours, inputs) -> Built:
    import attorch

    return {"layer_norm": _norm, "layer_norm_linear": _linear, "layer_norm_mlp": _mlp}[case.op](attorch, peer, inputs)


def _norm_of(attorch, x, eps):
    module = attorch.LayerNorm(x.shape[-1], eps=eps, device=x.device)
    return lambda x, weight, bias: functional_call(module, {"weight": weight, "bias": bias}, (x,))


def _linear_of(attorch, weight, bias, activation=None):
    outputs, channels = weight.shape
    module = attorch.Linear(channels, outputs, bias=bias is not None, act_func=activation, device=weight.device)

    def call(x, weight, bias):
        # Its weight is (in, out), of any strides.
        return functional_call(module, {"weight": weight.T} | ({} if bias is None else {"bias": bias}), (x,))

    return call


def _norm(attorch, peer, inputs) -> Built:
    check_known(peer.name, inputs, "x", "weight", "bias", "eps")
    norm = _norm_of(attorch, inputs["x"], inputs.get("eps", 1e-6))
    return Built(lambda x, weight, bias, **constant: norm(x, weight, bias), _NOTE)


def _linear(attorch, peer, inputs) -> Built:
    check_known(peer.name, inputs, "x", "norm_weight", "norm_bias", "weight", "bias", "eps")
    norm = _norm_of(attorch, inputs["x"], inputs.get("eps", 1e-6))
    linear = _linear_of(attorch, inputs["weight"], inputs.get("bias"))

    def call(x, norm_weight, norm_bias, weight, bias=None, **constant):
        return linear(norm(x, norm_weight, norm_bias), weight, bias)

    return Built(call, f"two modules; {_NOTE}")


def _mlp(attorch, peer, inputs) -> Built:
    tensors = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    check_known(peer.name, inputs, *tensors, "eps", "activation", "residual", "layer_scale")
    activation = inputs.get("activation", "gelu")
    if reason := _lacks(activation):
        raise ValueError(f"{peer.name}: {reason}")
    norm = _norm_of(attorch, inputs["x"], inputs.get("eps", 1e-6))
    fc1 = _linear_of(attorch, inputs["fc1_weight"], inputs.get("fc1_bias"), activation)
    fc2 = _linear_of(attorch, inputs["fc2_weight"], inputs.get("fc2_bias"))

    def call(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        residual=None,
        layer_scale=None,
        **constant,
    ):
        hidden = fc1(norm(x, norm_weight, norm_bias), fc1_weight, fc1_bias)
        return add_residual(fc2(hidden, fc2_weight, fc2_bias), residual, layer_scale)

    return Built(call, f"three modules; {_NOTE}")
