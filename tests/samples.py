"""Sample calls of every op, for the tests that hold all of them to one contract."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastvit

B, N, D, H, M = 2, 21, 24, 3, 40  # no size is a multiple of a block
BATCHED = ("x", "qkv", "image", "residual", "key_padding_mask", "drop_path_scale")  # the tensors of one row a sample


@dataclass(frozen=True)
class Sample:
    """`op(*tensors, **options)`: tensors by argument name, in the order of the op's signature."""

    name: str
    op: str
    build: Callable[[Callable], dict]
    options: dict

    def __str__(self):
        return self.name

    def tensors(self, dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
        """Fresh tensors; those of a floating dtype require grad, except drop_path_scale."""

        def draw(*shape, mean=0.0, scale=1.0):
            return (mean + scale * torch.randn(shape)).to(device, dtype)

        tensors = {name: t.to(device) for name, t in self.build(draw).items()}
        for name, tensor in tensors.items():
            tensor.requires_grad_(tensor.is_floating_point() and name != "drop_path_scale")
        return tensors

    def run(self, tensors, module=None):
        """The op's result; from `fastvit.ops`, or from another module of the same names."""
        return getattr(module or fastvit.ops, self.op)(**tensors, **self.options)


def _norm(draw, weight="norm_weight", bias="norm_bias"):
    return {weight: draw(D, mean=1.0, scale=0.2), bias: draw(D, scale=0.2)}


def _layer_norm(draw):
    return {"x": draw(B, N, D, mean=0.5), **_norm(draw, "weight", "bias")}


def _layer_norm_linear(draw):
    return {"x": draw(B, N, D, mean=0.5), **_norm(draw), "weight": draw(M, D, scale=0.2), "bias": draw(M)}


def _linear_residual(draw):
    return {
        "x": draw(B, N, M),
        "weight": draw(D, M, scale=0.2),
        "bias": draw(D),
        "residual": draw(B, N, D),
        "layer_scale": draw(D),
        "drop_path_scale": torch.tensor([1.25, 0.0]),
    }


def _layer_norm_mlp(draw):
    return {
        "x": draw(B, N, D, mean=0.5),
        **_norm(draw),
        "fc1_weight": draw(M, D, scale=0.2),
        "fc1_bias": draw(M),
        "fc2_weight": draw(D, M, scale=0.2),
        "fc2_bias": draw(D),
    }


def _layer_norm_mlp_residual(draw):
    return {
        **_layer_norm_mlp(draw),
        "residual": draw(B, N, D),
        "layer_scale": draw(D),
        "drop_path_scale": torch.tensor([1.25, 0.0]),
    }


def _attention(draw):
    return {"qkv": draw(B, N, 3, H, 8)}


def _attention_biased(draw):
    mask = torch.rand(B, N) < 0.7
    mask[:, 0] = True
    return {"qkv": draw(B, N, 3, H, 20), "key_padding_mask": mask, "attn_bias": draw(H, N, N)}


def _patch_embed(draw):
    return {
        "image": draw(B, 3, 12, 20),
        "weight": draw(D, 3, 4, 5, scale=0.2),
        "bias": draw(D),
        "pos_embed": draw(12 + 2, D),
        "prefix": draw(2, D),
    }


def _patch_embed_uint8(draw):
    tensors = _patch_embed(draw)
    return {**tensors, "image": torch.randint(0, 256, (B, 3, 12, 20), dtype=torch.uint8), "pos_embed": draw(12, D)}


_NORMALISED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}

SAMPLES = [
    Sample("layer_norm", "layer_norm", _layer_norm, {}),
    Sample("layer_norm_linear", "layer_norm_linear", _layer_norm_linear, {}),
    Sample("linear_residual", "linear_residual", _linear_residual, {}),
    Sample("layer_norm_mlp", "layer_norm_mlp", _layer_norm_mlp, {}),
    Sample("layer_norm_mlp-residual", "layer_norm_mlp", _layer_norm_mlp_residual, {"activation": "quick_gelu"}),
    Sample("attention", "attention", _attention, {}),
    Sample("attention-biased", "attention", _attention_biased, {"scale": 0.3}),
    Sample("patch_embed", "patch_embed", _patch_embed, _NORMALISED),
    Sample("patch_embed-uint8", "patch_embed", _patch_embed_uint8, _NORMALISED),
]
BY_NAME = {sample.name: sample for sample in SAMPLES}


def bad_call(name: str, changes: dict):
    """Call the op of a sample with `changes`, tensors or options, to its arguments: it should raise."""
    sample = BY_NAME[name]
    tensors = {key: tensor.detach() for key, tensor in sample.tensors().items()}
    return getattr(fastvit.ops, sample.op)(**{**tensors, **sample.options, **changes})


def timm_masks(tokens: int, heads: int) -> dict[str, dict]:
    """Arguments of timm's attention for two images, by the kind of mask."""
    return {
        "padding": {"attn_mask": (torch.arange(tokens) < torch.tensor([[tokens // 2], [tokens]]))[:, None, None, :]},
        "pairs": {"attn_mask": torch.rand(2, heads, tokens, tokens) < 0.7},
        "additive": {"attn_mask": torch.randn(tokens, tokens)},
        "causal": {"is_causal": True},
    }


def outputs_of(model, names, run: Callable) -> dict[str, torch.Tensor]:
    """What the submodules of these names give in `run(model)`, as hooks see it."""
    seen = {}
    with contextlib.ExitStack() as hooks:
        for name in names:

            def note(module, inputs, output, name=name):
                seen[name] = output

            hooks.enter_context(model.get_submodule(name).register_forward_hook(note))
        run(model)
    return seen


def relative_rms(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||, in float64."""
    got, truth = got.detach().double(), truth.detach().double()
    return (torch.linalg.vector_norm(got - truth) / torch.linalg.vector_norm(truth)).item()


def results(sample: Sample, tensors: dict, module=None, upstream=None) -> dict[str, torch.Tensor]:
    """Output and gradients by name; the output gradient, where none is given, is drawn from its shape, always the
    same."""
    out = sample.run(tensors, module)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return {"out": out, **gradients(out, tensors, upstream.to(out))}


def gradients(out: torch.Tensor, tensors: dict[str, torch.Tensor], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of each tensor that requires one, by name."""
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    values = torch.autograd.grad(out, list(wanted.values()), upstream)
    return dict(zip(wanted, values, strict=True))
