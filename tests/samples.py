"""Sample calls of every op, for the tests that hold all of them to one contract."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import fastvit
from fastvit import examples
from fastvit.accuracy import relative_rms as relative_rms

B, N, D, H, M = 2, 21, 24, 3, 40  # no size is a multiple of a block
BATCHED = (
    "x",
    "qkv",
    "image",
    "residual",
    "key_padding_mask",
    "drop_path_scale",
    "drop_path_scale1",
    "drop_path_scale2",
)  # the tensors of one row a sample


DRAWN = dict.fromkeys([name for name in BATCHED if name.startswith("drop_path")], torch.float32)


@dataclass(frozen=True)
class Sample:
    """`op(*tensors, **options)`: tensors by argument name, in the order of the op's signature."""

    name: str
    op: str
    sizes: Callable[[], dict]
    options: dict = field(default_factory=dict)
    dtypes: dict = field(default_factory=dict)

    def __str__(self):
        return self.name

    def tensors(self, dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
        """Fresh tensors; those of a floating dtype require grad, except drop-path scales, which are always float32."""
        draw = examples.Draw(dtype, device, dtypes={**DRAWN, **self.dtypes}, trained=True)
        tensors = examples.tensors(self.op, draw, **self.sizes())
        if "key_padding_mask" in tensors:  # with holes, and with a key for every query
            tensors["key_padding_mask"] = torch.rand(B, N, device=device) < 0.7
            tensors["key_padding_mask"][:, 0] = True
        return tensors

    def run(self, tensors, module=None):
        """The op's result; from `fastvit.ops`, or from another module of the same names."""
        return getattr(module or fastvit.ops, self.op)(**tensors, **self.options)


def _rows(dim, **more):
    return {"batch": B, "tokens": N, "dim": dim, **more}


def _heads(head_dim, *also):
    return {"batch": B, "tokens": N, "heads": H, "head_dim": head_dim, "also": also}


def _image(**more):
    return {"batch": B, "size": (12, 20), "patch": (4, 5), "dim": D, "prefix": 2, "also": examples.TABLES, **more}


NORMALISED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}

SAMPLES = [
    Sample("layer_norm", "layer_norm", lambda: _rows(D)),
    Sample("layer_norm_linear", "layer_norm_linear", lambda: _rows(D, out=M)),
    Sample("linear_residual", "linear_residual", lambda: _rows(M, out=D, also=examples.SCALES)),
    Sample("layer_norm_mlp", "layer_norm_mlp", lambda: _rows(D, hidden=M)),
    Sample(
        "layer_norm_mlp-residual",
        "layer_norm_mlp",
        lambda: _rows(D, hidden=M, also=("residual", *examples.SCALES)),
        {"activation": "quick_gelu"},
    ),
    Sample("attention", "attention", lambda: _heads(8)),
    Sample("attention-biased", "attention", lambda: _heads(20, "key_padding_mask", "attn_bias"), {"scale": 0.3}),
    Sample(
        "attention-rotary",
        "attention",
        lambda: _heads(12, *examples.ROPE),
        {"rope_interleaved": True, "num_queries": 10},
    ),
    Sample(
        "attention_varlen", "attention_varlen", lambda: {"sequences": 4, "heads": H, "head_dim": 8}, {"max_seqlen": 39}
    ),
    Sample(
        "attention_varlen-rotary",
        "attention_varlen",
        lambda: {"sequences": 3, "heads": H, "head_dim": 12, "also": examples.ROPE},
        {"max_seqlen": 30},
    ),
    Sample("patch_embed", "patch_embed", lambda: _image(), NORMALISED),
    Sample("transformer_block", "transformer_block", lambda: _rows(D, heads=H, hidden=M), {"num_heads": H}),
    Sample(
        "transformer_block-gated",
        "transformer_block",
        lambda: _rows(D, heads=H, hidden=M, gated=True),
        {"num_heads": H},
    ),
    Sample(
        "transformer_block-all",
        "transformer_block",
        lambda: _rows(
            40, heads=2, hidden=56, also=(*examples.BLOCK_SCALES, "key_padding_mask", "attn_bias", *examples.ROPE)
        ),
        {
            **{"num_heads": 2, "activation": "gelu_tanh", "scale": 0.2, "eps1": 1e-5, "recompute_fc1": True},
            "rope_interleaved": True,
        },
    ),
    Sample(
        "patch_embed-uint8",
        "patch_embed",
        lambda: _image(prefix_has_positions=False),
        NORMALISED,
        {"image": torch.uint8},
    ),
]
BY_NAME = {sample.name: sample for sample in SAMPLES}
every_op = pytest.mark.parametrize("sample", SAMPLES, ids=str)
# For the dearest contracts: of the block's forms the one with everything but a gate, the others where it is asked for.
every_op_one_block = pytest.mark.parametrize(
    "sample",
    [
        pytest.param(s, marks=pytest.mark.slow if s.name in ("transformer_block", "transformer_block-gated") else ())
        for s in SAMPLES
    ],
    ids=str,
)
HALF = [torch.bfloat16, torch.float16]


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
