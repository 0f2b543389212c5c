"""`fastvit.accelerate` of the original DINOv2 and DeiT code, which is not installed here.

In its stead doubles: modules of the same structure, names of submodules, parameters and attributes, whose forward
passes compute the same in other words. These are made known for the test under the names that the originals' have.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dropin_models import randomise, timm
from torch import nn

import fastvit
from fastvit import dispatch
from fastvit.accuracy import relative_rms
from fastvit.dropin import forwards

norm_layer = partial(nn.LayerNorm, eps=1e-6)
D, HEADS = 48, 3


class DoubleAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim), nn.Dropout(0.0)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        packed = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class DoubleMemEffAttention(DoubleAttention):
    def forward(self, x, attn_bias=None):
        assert attn_bias is None
        return super().forward(x)


class DoubleMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DoubleSwiGLUFFN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(value * F.silu(gate))


class DoubleDinov2Block(nn.Module):
    def __init__(self, mlp=DoubleMlp, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = norm_layer(D), DoubleMemEffAttention(D, HEADS)
        self.ls1, self.drop_path1 = timm.layers.LayerScale(D), nn.Identity()
        self.norm2, self.mlp = norm_layer(D), mlp(D)
        self.ls2, self.drop_path2 = timm.layers.LayerScale(D), nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x):
        kept = torch.rand(len(x)) >= (self.sample_drop_ratio if self.training else 0)
        x = x + kept[:, None, None] * self.ls1(self.attn(self.norm1(x)))
        return x + kept[:, None, None] * self.ls2(self.mlp(self.norm2(x)))


class DoubleNestedBlock(DoubleDinov2Block):
    def forward(self, x_or_list):
        return super().forward(x_or_list) if isinstance(x_or_list, torch.Tensor) else x_or_list


class DoubleDeitBlock(nn.Module):
    def __init__(self, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = norm_layer(D), DoubleAttention(D, HEADS)
        self.drop_path = timm.layers.DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2, self.mlp = norm_layer(D), timm.layers.Mlp(D, 2 * D)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DoubleDeitScaledBlock(DoubleDeitBlock):
    def __init__(self, drop_path=0.0):
        super().__init__(drop_path)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


ORIGINALS = {
    DoubleAttention: "attention without masks",
    DoubleMemEffAttention: "what its base class's does",
    DoubleMlp: "mlp with one dropout",
    DoubleSwiGLUFFN: "silu glu",
    DoubleDinov2Block: "dinov2 block",
    DoubleNestedBlock: "what its base class's does",
    DoubleDeitBlock: "deit block",
    DoubleDeitScaledBlock: "deit scaled block",
}
BLOCKS = {
    "DINOv2": DoubleNestedBlock,
    "DINOv2 giant": partial(DoubleNestedBlock, DoubleSwiGLUFFN),
    "DeiT": DoubleDeitBlock,
    "DeiT III": DoubleDeitScaledBlock,
}


@pytest.fixture
def known(monkeypatch):
    for double, name in ORIGINALS.items():
        assert name in forwards.KNOWN.values()
        monkeypatch.setitem(forwards.KNOWN, forwards.digest(forwards.tree_of(double.forward)), name)
    forwards._read.cache_clear()
    yield
    forwards._read.cache_clear()


def gradients(model, x, backend):
    torch.manual_seed(3)
    ran = []
    with fastvit.use_backend(backend), dispatch.watching(lambda op, args: ran.append(op.name)):
        y = model(x)
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    return [y, *found], ran


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, drop_path, training, known):
    torch.manual_seed(1)
    model, x = randomise(BLOCKS[name](drop_path=drop_path)).train(training), torch.randn(4, 17, D)
    want, _ = gradients(model, x, "torch")
    (entry,) = fastvit.accelerate(model, strict=True).entries
    got, ran = gradients(model, x, "triton")
    # DINOv2 leaves whole samples out of what it computes: its own way, which is no drop path.
    own = training and drop_path and name.startswith("DINOv2")
    assert ran == ([] if own else ["transformer_block"])
    torch.testing.assert_close(got, want, rtol=0 if own else 1e-4, atol=0 if own else 1e-4)
    assert ("layer-scale" in entry.options) == (name != "DeiT")
    assert ("silu" in entry.options) == (name == "DINOv2 giant")
    fastvit.restore(model)
    torch.testing.assert_close(gradients(model, x, "triton")[0], want, rtol=0, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_parts(name, known):
    torch.manual_seed(1)
    model, x = randomise(BLOCKS[name]()), torch.randn(2, 17, D)
    want = model(x)
    summary = fastvit.accelerate(model, modules=("attention", "mlp"))
    reasons = {
        "DINOv2 giant": "it is gated, which only whole blocks may be",
        "DeiT III": "its layer-scale is no module, which only whole blocks may have",
    }
    assert {entry.reason for entry in summary.left_alone} == ({reasons[name]} if name in reasons else set())
    with fastvit.use_backend("triton"):
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert "attention" in {entry.kind for entry in summary.swapped}


def test_a_layer_scale_that_is_quantised_since(known):
    class Quantised(torch.Tensor):
        pass

    model, x = DoubleDeitScaledBlock(), torch.randn(2, 5, D)
    fastvit.accelerate(model)
    assert gradients(model, x, "triton")[1] == ["transformer_block"]
    model.gamma_1 = nn.Parameter(model.gamma_1.detach().as_subclass(Quantised))
    with torch.no_grad():
        ran = []
        with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: ran.append(op.name)):
            model(x)
    assert ran == []


def test_lists_of_tensors_are_the_blocks_own(known):
    model = DoubleNestedBlock()
    fastvit.accelerate(model)
    several = [torch.randn(1, 5, D), torch.randn(1, 7, D)]
    with fastvit.use_backend("triton"):
        assert model(several) is several


def test_a_base_that_is_not_known(known, monkeypatch):
    """What a class hands on to its base is what the base does."""
    monkeypatch.setattr(DoubleDinov2Block, "forward", lambda self, x: x)
    assert not fastvit.accelerate(DoubleNestedBlock(), modules=("block", "mlp")).swapped


class DoubleDinoVisionTransformer(nn.Module):
    """With its registers after the class token, which has a position of its own."""

    __module__ = "dinov2.models.vision_transformer"

    def __init__(self, block, registers):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.zeros(1, 17, D))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, D)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, D))
        self.patch_embed = timm.layers.PatchEmbed(32, 8, 3, D)
        self.blocks, self.norm, self.head = nn.ModuleList([block(), block()]), norm_layer(D), nn.Identity()

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1) + self.pos_embed
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 giant"])
def test_frozen(name, registers, known):
    torch.manual_seed(1)
    model = randomise(DoubleDinoVisionTransformer(BLOCKS[name], registers)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(images)
    assert relative_rms(fastvit.freeze(model, runtime="torch")(images), want) < 2e-6
    fastvit.accelerate(model)
    assert relative_rms(fastvit.freeze(model, runtime="torch")(images), want) < 2e-6
