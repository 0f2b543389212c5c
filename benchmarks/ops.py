"""The arguments of a single op as it stands in a model's blocks: random normal data, from the model's configuration."""

from __future__ import annotations

import copy

import torch

from fastvit import examples

from .cases import Case
from .timing import cache_bytes

SEED = 0
MOST_BYTES = 400 << 20  # of copies, on a CPU


def inputs(case: Case, device: str) -> dict:
    """The arguments of `fastvit.ops.<case.op>` by name: tensors in the case's dtype, and what else it takes.

    They are those of `fastvit.examples`. For training every tensor but the image requires a gradient. Raises ValueError
    where the model has no such op.
    """
    config, dim = case.config, case.config.embed_dim
    if not case.op:
        raise ValueError(f"{case.id} is of a whole model, expected a case of one op")
    if case.op in ("layer_norm_mlp", "transformer_block") and config.mlp != "mlp":
        raise ValueError(f"{case.model} has no {case.op}: its MLP is {config.mlp!r}")
    batch, heads = {"batch": case.batch}, config.num_heads
    shape = {**batch, "tokens": case.tokens, "dim": dim}
    scaled, hidden = config.init_values is not None, int(dim * config.mlp_ratio)
    scale = ["layer_scale"] if scaled else []
    eps, prefix = {"eps": config.norm_eps}, config.num_prefix_tokens
    image = {"size": config.img_size, "patch": config.patch_size, "dim": dim, "channels": config.in_chans}
    image |= {"prefix": prefix, "prefix_has_positions": not config.no_embed_class}
    sizes, options = {
        "patch_embed": ({**batch, **image, "also": examples.TABLES[: 2 if prefix else 1]}, {}),
        "attention": ({**batch, "tokens": case.tokens, "heads": heads, "head_dim": dim // heads}, {}),
        "layer_norm": (shape, eps),
        "layer_norm_linear": (shape | {"out": 3 * dim}, eps),
        "linear_residual": (shape | {"out": dim, "also": scale}, {}),
        "layer_norm_mlp": (shape | {"hidden": hidden, "also": scale}, eps | {"activation": config.activation}),
        "transformer_block": (
            shape | {"heads": heads, "hidden": hidden, "also": examples.BLOCK_SCALES[:2] if scaled else []},
            {"num_heads": heads, "eps1": config.norm_eps, "eps2": config.norm_eps, "activation": config.activation},
        ),
    }[case.op]
    generator = torch.Generator().manual_seed(SEED)
    draw = examples.Draw(case.dtype, device, generator, trained=case.mode == "training")
    tensors = examples.tensors(case.op, draw, **sizes)
    if case.op == "patch_embed":
        tensors["image"].requires_grad_(False)
    if case.op == "layer_norm_mlp":  # as in a block
        tensors["residual"] = tensors["x"]
    return tensors | options


def cold(arguments: dict, device: str) -> list[dict]:
    """Copies of the arguments, itself the first, together more than twice the last cache: called in turn, each finds
    its data in memory and not in the cache. On a CPU no more than MOST_BYTES of them."""
    tensors = {id(value): value for value in arguments.values() if isinstance(value, torch.Tensor)}
    one = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    wanted = 2 * cache_bytes(device)
    if not device.startswith("cuda"):
        wanted = min(wanted, MOST_BYTES - one)
    return [arguments, *(copy.deepcopy(arguments) for _ in range(wanted // one))]
