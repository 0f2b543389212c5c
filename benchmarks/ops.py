"""The arguments of a single op as it stands in a model's blocks: random normal data, from the model's configuration."""

from __future__ import annotations

import copy

import torch

from .cases import Case
from .timing import cache_bytes

SEED = 0
MOST_BYTES = 400 << 20  # of copies, on a CPU


def inputs(case: Case, device: str) -> dict:
    """The arguments of `fastvit.ops.<case.op>` by name: tensors in the case's dtype, and what else it takes.

    Activations are standard normal, weights scaled to keep them so, biases and tables small. For training every
    tensor but the image requires a gradient. Raises ValueError where the model has no such op.
    """
    config, generator = case.config, torch.Generator().manual_seed(SEED)
    dim, batch, training = config.embed_dim, case.batch, case.mode == "training"

    def draw(*shape, mean=0.0, scale=1.0, grad=training):
        values = mean + scale * torch.randn(shape, generator=generator)
        return values.to(device, case.dtype).requires_grad_(grad)

    def linear(prefix, outputs, columns):
        return {
            f"{prefix}weight": draw(outputs, columns, scale=columns**-0.5),
            f"{prefix}bias": draw(outputs, scale=0.2),
        }

    x = (batch, case.tokens, dim)
    scale = {} if config.init_values is None else {"layer_scale": draw(dim, mean=0.5, scale=0.2)}
    if case.op == "patch_embed":
        height, width = config.img_size
        patch = (config.in_chans, *config.patch_size)
        fan_in = config.in_chans * config.patch_size[0] * config.patch_size[1]
        prefix = config.num_prefix_tokens
        return {
            "image": draw(batch, config.in_chans, height, width, grad=False),
            "weight": draw(dim, *patch, scale=fan_in**-0.5),
            "bias": draw(dim, scale=0.2),
            "pos_embed": draw(case.tokens - (prefix if config.no_embed_class else 0), dim, scale=0.2),
            **({"prefix": draw(prefix, dim)} if prefix else {}),
        }
    if case.op == "attention":
        return {"qkv": draw(batch, case.tokens, 3, config.num_heads, dim // config.num_heads)}
    if case.op == "layer_norm":
        return {
            "x": draw(*x),
            "weight": draw(dim, mean=1.0, scale=0.2),
            "bias": draw(dim, scale=0.2),
            "eps": config.norm_eps,
        }
    if case.op == "linear_residual":
        return {"x": draw(*x), **linear("", dim, dim), "residual": draw(*x), **scale}
    norm = {"norm_weight": draw(dim, mean=1.0, scale=0.2), "norm_bias": draw(dim, scale=0.2)}
    if case.op == "layer_norm_linear":
        return {"x": draw(*x), **norm, **linear("", 3 * dim, dim), "eps": config.norm_eps}
    if case.op == "layer_norm_mlp":
        if config.mlp != "mlp":
            raise ValueError(f"{case.model} has no layer_norm_mlp: its MLP is {config.mlp!r}")
        hidden, stream = int(dim * config.mlp_ratio), draw(*x)
        ends = {"residual": stream, **scale, "eps": config.norm_eps, "activation": config.activation}
        return {"x": stream, **norm, **linear("fc1_", hidden, dim), **linear("fc2_", dim, hidden), **ends}
    raise ValueError(f"{case.id} is of a whole model, expected a case of one op")


def precise(arguments: dict) -> dict:
    """The same values in float64, each tensor once: a residual that is x stays x."""
    memo = {}

    def double(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in memo:
            memo[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
        return memo[id(value)]

    return {name: double(value) for name, value in arguments.items()}


def cold(arguments: dict, device: str) -> list[dict]:
    """Copies of the arguments, itself the first, together more than twice the last cache: called in turn, each finds
    its data in memory and not in the cache. On a CPU no more than MOST_BYTES of them."""
    tensors = {id(value): value for value in arguments.values() if isinstance(value, torch.Tensor)}
    one = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    wanted = 2 * cache_bytes(device)
    if not device.startswith("cuda"):
        wanted = min(wanted, MOST_BYTES - one)
    return [arguments, *(copy.deepcopy(arguments) for _ in range(wanted // one))]
