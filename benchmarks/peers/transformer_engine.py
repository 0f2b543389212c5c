"""NVIDIA's TransformerEngine: its fused modules, with the op's own tensors in the place of their parameters.

Written from its documented signatures and tested against stand-ins that have them: never run with the package, which
needs a GPU.
"""

from __future__ import annotations

from torch.func import functional_call

from . import Built
from ._common import add_residual, check_known

# Its "gelu" is the tanh form.
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu", "quick_gelu": "qgelu"}
_NOTE = "host time includes placing the weights in the module"


def unfit(peer, case, config, device) -> str | None:
    return _lacks(config.activation) if case.op == "layer_norm_mlp" else None


def _lacks(activation: str) -> str | None:
    return None if activation in _ACTIVATIONS else f"has no {activation} without a gate"


def build(peer, case, ours, inputs) -> Built:
    import transformer_engine.pytorch as te

    return {"attention": _attention, "layer_norm_linear": _linear, "layer_norm_mlp": _mlp}[case.op](te, peer, inputs)


def _attention(te, peer, inputs) -> Built:
    check_known(peer.name, inputs, "qkv", "scale")
    heads, head_dim = inputs["qkv"].shape[3:]
    # Where no scale is given it takes the same as ours.
    scale = {} if inputs.get("scale") is None else {"softmax_scale": inputs["scale"]}
    module = te.DotProductAttention(heads, head_dim, qkv_format="bshd", attn_mask_type="no_mask", **scale)

    def call(qkv, **constant):
        return module(*qkv.unbind(2))  # each (B, N, H, d), to (B, N, H * d)

    return Built(call)


def _linear(te, peer, inputs) -> Built:
    check_known(peer.name, inputs, "x", "norm_weight", "norm_bias", "weight", "bias", "eps")
    weight = inputs["weight"]
    module = te.LayerNormLinear(
        weight.shape[1],
        weight.shape[0],
        eps=inputs.get("eps", 1e-6),
        bias=inputs.get("bias") is not None,
        params_dtype=weight.dtype,
        device=weight.device,
    )

    def call(x, norm_weight, norm_bias, weight, bias=None, **constant):
        parameters = {"layer_norm_weight": norm_weight, "layer_norm_bias": norm_bias, "weight": weight}
        return functional_call(module, parameters | ({} if bias is None else {"bias": bias}), (x,))

    return Built(call, _NOTE)


def _mlp(te, peer, inputs) -> Built:
    tensors = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    check_known(peer.name, inputs, "x", *tensors, "eps", "activation", "residual", "layer_scale")
    weight, activation = inputs["fc1_weight"], inputs.get("activation", "gelu")
    if reason := _lacks(activation):
        raise ValueError(f"{peer.name}: {reason}")
    if inputs["fc2_weight"].shape[0] != weight.shape[1]:
        raise ValueError(f"{peer.name}: has no MLP from {weight.shape[1]} to {inputs['fc2_weight'].shape[0]} channels")
    biases = [inputs.get(name) is not None for name in ("fc1_bias", "fc2_bias")]
    if biases[0] != biases[1]:
        raise ValueError(f"{peer.name}: has both biases or none")
    module = te.LayerNormMLP(
        weight.shape[1],
        weight.shape[0],
        eps=inputs.get("eps", 1e-6),
        bias=biases[0],
        activation=_ACTIVATIONS[activation],
        params_dtype=weight.dtype,
        device=weight.device,
    )

    def call(x, residual=None, layer_scale=None, **rest):
        given = {name: rest[name] for name in tensors if rest.get(name) is not None}
        parameters = {name.replace("norm_", "layer_norm_"): tensor for name, tensor in given.items()}
        return add_residual(functional_call(module, parameters, (x,)), residual, layer_scale)

    return Built(call, f"tanh GELU; {_NOTE}" if activation == "gelu" else _NOTE)
