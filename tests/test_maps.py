"""attention_maps: what it gives, for which models, and that it leaves them alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from samples import outputs_of
from torch import nn

import fastvit
from fastvit import attention_maps
from fastvit.nn import Attention, Block

timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
TOKENS = 17
MODELS = {
    "ours": partial(fastvit.create_model, "vit_base_patch16_224", **SMALL),
    "our_siglip": partial(fastvit.create_model, "vit_base_patch16_siglip_224", **SMALL, class_token=True),
    "our_dinov3": partial(fastvit.create_model, "vit_small_patch16_dinov3", **SMALL),
    "our_registers": partial(fastvit.create_model, "vit_small_patch14_reg4_dinov2", **SMALL, reg_tokens=4),
    **{
        name: partial(timm.create_model, "vit_base_patch16_224", **SMALL, **parts)
        for name, parts in {
            "timm": {},
            "timm_qk_norm": {"qk_norm": True},
            "timm_attn_layer": {"attn_layer": Attention},
            "timm_block_fn": {"block_fn": Block},
        }.items()
    },
}


def build(name):
    """A model whose attention is far from even."""
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", MODELS)
def test_they_make_the_attentions_output(name, images):
    model = build(name)
    maps = attention_maps(model, images)
    parts = [f"blocks.{i}.attn{part}" for i in range(3) for part in ("", ".qkv")]
    outputs = outputs_of(model, parts, lambda m: m(images))
    assert len(maps) == 3
    for i, probabilities in enumerate(maps):
        tokens = TOKENS + 4 * (name in ("our_registers", "our_dinov3"))
        assert probabilities.shape == (2, 3, tokens, tokens) and probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, tokens))
        assert probabilities.max() > 4 / tokens and probabilities.min() >= 0
        _, _, v = outputs[f"blocks.{i}.attn.qkv"].unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        by_maps = model.blocks[i].attn.proj((probabilities @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(by_maps, outputs[f"blocks.{i}.attn"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["timm", "timm_qk_norm"])
def test_they_are_timms(name, images):
    model = build(name)
    maps = attention_maps(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
    want = outputs_of(model, [f"blocks.{i}.attn.attn_drop" for i in range(3)], lambda m: m(images))
    torch.testing.assert_close(maps, list(want.values()), rtol=1e-5, atol=1e-6)
    if name == "timm":
        ours = build("ours")
        ours.load_state_dict(model.state_dict())
        torch.testing.assert_close(attention_maps(ours, images), maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "indices, layers",
    [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), ([0], [0]), ((-1, 0), [0, 2]), (range(2), [0, 1]), ([1, -2], [1])],
)
def test_indices_choose_layers_in_forward_order(indices, layers, images):
    model = build("ours")
    every = attention_maps(model, images)
    chosen = attention_maps(model, images, indices)
    assert len(chosen) == len(layers) and all(torch.equal(a, every[i]) for a, i in zip(chosen, layers, strict=True))


class Masked(nn.Module):
    """A layer that is called with masks."""

    def __init__(self, layer, *masks, **named):
        super().__init__()
        self.layer, self.masks, self.named = layer, masks, named

    def forward(self, x):
        return self.layer(x, *self.masks, **self.named)


@pytest.mark.parametrize("layer", [Attention, timm.layers.Attention, Block])
def test_masks_count(layer):
    layer = layer(48, 3)
    x = torch.randn(2, 7, 48)
    (causal,) = attention_maps(Masked(layer, is_causal=True), x)
    torch.testing.assert_close(causal, causal.tril())
    torch.testing.assert_close(causal.sum(-1), torch.ones(2, 3, 7))
    (plain,) = attention_maps(Masked(layer), x)
    bias = torch.randn(3, 7, 7)
    (biased,) = attention_maps(Masked(layer, bias), x)
    torch.testing.assert_close(biased, (plain.log() + bias).softmax(-1))
    padding = (torch.arange(7) < torch.tensor([[3], [0]]))[:, None, None]
    (padded,) = attention_maps(Masked(layer, attn_mask=padding), x)
    torch.testing.assert_close(padded[0], plain[0] * padding[0] / plain[0, ..., :3].sum(-1, keepdim=True))
    assert (padded[1] == 0).all()


def test_a_model_is_left_as_it_was(images):
    model = build("ours").train()
    model.blocks[1].eval()
    fired = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: fired.append(1))
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def unchanged():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert sum(hooks) == 1 and modes == {name: module.training for name, module in model.named_modules()}
        assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())

    maps = attention_maps(model, images)
    unchanged()
    assert fired == [1] and not any(probabilities.requires_grad for probabilities in maps)
    with pytest.raises(ValueError, match="image is 32 x 24"):
        attention_maps(model, images[..., :24])
    unchanged()
    assert model.blocks[2].can_fuse_attention() and torch.is_grad_enabled()


def test_it_runs_in_eval_mode(images):
    model = fastvit.create_model("vit_base_patch16_224", **SMALL, drop_path_rate=0.5, attn_drop_rate=0.5)
    torch.testing.assert_close(attention_maps(model.train(), images), attention_maps(model.eval(), images))


def test_pixels_other_dtypes_and_autocast():
    model = build("ours")
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.mean, model.config.std))
    want = attention_maps(model, (pixels / 255 - mean) / std)
    torch.testing.assert_close(attention_maps(model, pixels), want, rtol=1e-4, atol=1e-5)
    # Only q and k are rounded: a row still sums to 1 as float32 has it.
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention_maps(model, pixels, 1)
    for (maps,) in (cast, attention_maps(model.bfloat16(), pixels, 1)):
        assert maps.dtype == torch.float32 and (maps.sum(-1) - 1).abs().max() < 1e-6


def test_a_compiled_model(images):
    model = build("ours")
    want = attention_maps(model, images)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images)
    torch.testing.assert_close(attention_maps(compiled, images), want)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.other = Attention(48, 3), Attention(48, 3)

    def forward(self, x):
        return self.attn(x)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda m, x: attention_maps("vit", x), TypeError, "model is a str, expected a torch.nn.Module"),
        (lambda m, x: attention_maps(nn.Linear(3, 3), x), ValueError, "model, a Linear, has no attention layers of"),
        (lambda m, x: attention_maps(m, x, 4), ValueError, "indices is 4, expected a number of blocks from 1 to 3"),
        (lambda m, x: attention_maps(m, x, 0), ValueError, "indices is 0, expected a number of blocks from 1 to 3"),
        (lambda m, x: attention_maps(m, x, [3]), ValueError, r"indices is \[3\], expected block numbers from -3 to 2"),
        (lambda m, x: attention_maps(m, x, []), ValueError, r"indices is \[\], expected block numbers from -3 to 2"),
        (lambda m, x: attention_maps(m, x, True), TypeError, "indices is True, expected None, a number of blocks, or"),
        (lambda m, x: attention_maps(m, x, "last"), TypeError, "indices is 'last', expected None, a number of blocks"),
        (lambda m, x: attention_maps(m, x, 1.5), TypeError, "indices is 1.5, expected None, a number of blocks, or"),
        (lambda m, x: attention_maps(Unused(), torch.randn(1, 7, 48)), ValueError, "model ran 1 attention layers, exp"),
    ],
)
def test_refusals(call, error, text, images):
    with pytest.raises(error, match=text):
        call(build("ours"), images)
