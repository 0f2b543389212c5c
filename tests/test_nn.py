"""Modules: what they compute, when they fuse and when they must not, and what they refuse."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit import ops, reference
from fastvit.accuracy import FACTOR, relative_rms
from fastvit.nn import Attention, Block, DropPath, LayerNormMLP, LayerScale, Mlp, PatchEmbed, QuickGELU, SwiGLU

D, HEADS, TOKENS = 48, 3, 7


def block(**overrides):
    arguments = {"qkv_bias": True, "init_values": 0.5, "drop_path": 0.4, **overrides}
    return perturbed(Block(D, HEADS, **arguments))


def perturbed(module):
    """No parameter left at zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def composed(module, x):
    """A block by its submodules."""
    x = x + module.drop_path1(module.ls1(module.attn(module.norm1(x))))
    return x + module.drop_path2(module.ls2(module.mlp(module.norm2(x))))


def composed_mlp(module, x):
    branch = module.drop_path(module.ls(module.fc2(module.act(module.fc1(module.norm(x))))))
    return x + branch if module.residual else branch


def seeded(function, *args):
    torch.manual_seed(11)
    return function(*args)


@pytest.fixture
def fused_calls(monkeypatch):
    """Names of the fused ops called since."""
    calls = []
    for name in ("layer_norm_linear", "linear_residual", "layer_norm_mlp", "patch_embed"):

        def counted(*args, _name=name, _op=getattr(ops, name), **kwargs):  # noqa: B008
            calls.append(_name)
            return _op(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    return calls


WHOLE_BLOCK = {
    Mlp: ["layer_norm_linear", "linear_residual", "layer_norm_mlp"],
    SwiGLU: ["layer_norm_linear", "linear_residual", "layer_norm_linear", "linear_residual"],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mlp_layer", WHOLE_BLOCK)
def test_a_fused_block_is_its_submodules(mlp_layer, training, fused_calls):
    module = block(mlp_layer=mlp_layer).double().train(training)
    x = torch.randn(8, TOKENS, D, dtype=torch.float64, requires_grad=True)
    out = seeded(module, x)
    assert fused_calls == WHOLE_BLOCK[mlp_layer]
    want = seeded(composed, module, x)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    wanted = [x, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(out, wanted, grad), torch.autograd.grad(want, wanted, grad), rtol=1e-6, atol=1e-9
    )


# Attention dropout happens inside the attention op, fused or not; its module only holds the rate.
SUBMODULES = [name for name, _ in block().named_modules() if name not in ("", "attn.attn_drop")]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre", "own_forward", "everywhere"])
@pytest.mark.parametrize("name", SUBMODULES)
def test_hooks_on_any_submodule_fire(name, kind):
    module = block().eval()
    x = torch.randn(2, TOKENS, D, requires_grad=True)
    want = module(x)
    target, fired = module.get_submodule(name), []

    def note(hooked, *_):
        if hooked is target:
            fired.append(kind)

    if kind == "own_forward":  # as libraries that move weights around do it
        forward = target.forward
        target.forward = lambda *args, **kwargs: (note(target), forward(*args, **kwargs))[1]
        handle = None
    elif kind == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(note)
    else:
        register = {
            "forward": target.register_forward_hook,
            "pre": target.register_forward_pre_hook,
            "backward": target.register_full_backward_hook,
            "backward_pre": target.register_full_backward_pre_hook,
        }
        handle = register[kind](note)
    try:
        out = module(x)
        out.sum().backward()
    finally:
        if handle is not None:
            handle.remove()
    assert fired == [kind]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


class Adapted(nn.Linear):
    """An adapter as they come: the base layer's weight, and more in forward."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_replaced_linear_layer_takes_part(name):
    module = block().eval()
    parent, _, child = name.rpartition(".")
    layer = module.get_submodule(name)
    adapted = Adapted(layer.in_features, layer.out_features)
    adapted.load_state_dict(layer.state_dict())
    x = torch.randn(2, TOKENS, D)
    before = module(x)
    setattr(module.get_submodule(parent), child, adapted)
    torch.testing.assert_close(module(x), composed(module, x))
    assert (module(x) - before).abs().max() > 0.01


@pytest.mark.parametrize("mlp_layer", WHOLE_BLOCK)
def test_active_dropout_is_applied_and_idle_dropout_fuses(mlp_layer, fused_calls):
    module = block(mlp_layer=mlp_layer, proj_drop=0.5, attn_drop=0.5)
    x = torch.randn(2, TOKENS, D)
    out = seeded(module.train(), x)
    assert fused_calls == []
    torch.testing.assert_close(out, seeded(composed, module, x))
    assert (out - module.eval()(x)).abs().max() > 0.1
    assert fused_calls == WHOLE_BLOCK[mlp_layer]


def test_attention_dropout_alone_still_fuses(fused_calls):
    module = block(attn_drop=0.5, drop_path=0.0).train()
    x = torch.randn(2, TOKENS, D)
    assert (seeded(module, x) - module(x)).abs().max() > 0.01
    assert fused_calls == 2 * WHOLE_BLOCK[Mlp]
    assert (module.eval()(x) - module(x)).abs().max() == 0


@pytest.mark.parametrize("mlp_layer", WHOLE_BLOCK)
def test_autocast_has_the_dtypes_of_the_submodules(mlp_layer):
    module = block(mlp_layer=mlp_layer).eval()
    x = torch.randn(2, TOKENS, D)
    with torch.autocast("cpu", torch.bfloat16):
        out, want = module(x), composed(module, x)
    assert out.dtype == want.dtype == torch.float32
    truth = copy.deepcopy(module).double()(x.double())
    assert relative_rms(out, truth) <= FACTOR[torch.bfloat16] * relative_rms(want, truth)


@pytest.mark.parametrize("training", [True, False])
def test_block_compiles_in_one_piece(training):
    module = block().train(training)
    x = torch.randn(2, TOKENS, D)
    out = seeded(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(out, seeded(module, x), rtol=1e-4, atol=1e-5)


def test_attention_against_torch():
    module = perturbed(Attention(D, HEADS, attn_head_dim=8, dim_out=20, qkv_bias=True)).double()
    x = torch.randn(2, TOKENS, D, dtype=torch.float64)
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)
    masks = {
        "none": {},
        "causal": {"is_causal": True},
        "pairs": {"attn_mask": torch.rand(2, HEADS, TOKENS, TOKENS) < 0.8},
        "one_for_all": {"attn_mask": torch.rand(TOKENS, TOKENS) < 0.8},
        "padding": {"attn_mask": (torch.arange(TOKENS) < torch.tensor([[3], [5]]))[:, None, None]},
        "additive": {"attn_mask": torch.randn(HEADS, TOKENS, TOKENS, dtype=torch.float64)},
    }
    for name, mask in masks.items():
        if mask.get("attn_mask") is not None and mask["attn_mask"].dtype == torch.bool:
            mask["attn_mask"][..., 0] = True  # nobody is left without a key
        want = F.scaled_dot_product_attention(q, k, v, **mask).transpose(1, 2).flatten(2)
        torch.testing.assert_close(module(x, **mask), module.proj(want), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("act_layer", [nn.GELU, partial(nn.GELU, approximate="tanh"), nn.SiLU, QuickGELU, nn.ReLU])
@pytest.mark.parametrize("residual", [True, False])
def test_layer_norm_mlp_is_its_submodules(act_layer, residual, fused_calls):
    module = LayerNormMLP(D, 80, act_layer, init_values=0.5, drop_path=0.4, residual=residual)
    module = perturbed(module).double()
    x = torch.randn(8, TOKENS, D, dtype=torch.float64, requires_grad=True)
    out, want = seeded(module, x), seeded(composed_mlp, module, x)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    wanted = [x, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(out, wanted, grad), torch.autograd.grad(want, wanted, grad), rtol=1e-6, atol=1e-9
    )
    assert fused_calls == ([] if act_layer is nn.ReLU else ["layer_norm_mlp"])


def test_layer_norm_mlp_defaults():
    module = LayerNormMLP(D)
    names = ["norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert list(module.state_dict()) == names and module.fc1.out_features == 4 * D and module.norm.eps == 1e-6
    fired = []
    module.fc1.register_forward_hook(lambda *_: fired.append(1))
    x = torch.randn(2, D)
    torch.testing.assert_close(module(x), composed_mlp(module, x))
    assert len(fired) == 2


def test_drop_path_keeps_the_mean_and_whole_samples():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    kept = drop(x)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (kept == kept[:, :1, :1]).all() and abs(kept.mean() - 1) < 0.05
    assert drop.eval()(x) is x and DropPath(1.0)(x).sum() == 0


def test_layer_scale():
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(LayerScale(D, 0.1)(x), 0.1 * x)


def patch_embed(**arguments):
    return perturbed(PatchEmbed(**{"img_size": (16, 24), "patch_size": (8, 4), "embed_dim": D, **arguments}))


def test_patch_embed_is_a_convolution(fused_calls):
    module = patch_embed()
    assert module.grid_size == (2, 6) and module.num_patches == 12 and module.feat_ratio() == 8
    for image in (torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24).to(memory_format=torch.channels_last)):
        want = module.proj(image).flatten(2).transpose(1, 2)
        torch.testing.assert_close(module(image), want, rtol=1e-4, atol=1e-5)
    assert fused_calls == ["patch_embed"] * 2


@pytest.mark.parametrize("rows", ["patches", "all", "none"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_hooked_projection_gives_the_same_tokens(dtype, prefix, rows, fused_calls):
    module = patch_embed()
    image = torch.rand(2, 3, 16, 24) if dtype.is_floating_point else torch.randint(256, (2, 3, 16, 24), dtype=dtype)
    arguments = {
        "prefix": torch.randn(2, D) if prefix else None,
        "pos_embed": {"patches": torch.randn(12, D), "all": torch.randn(12 + 2 * prefix, D), "none": None}[rows],
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.4),
    }
    want = module(image, **arguments)
    fired = []
    module.proj.register_forward_hook(lambda *_: fired.append(1))
    torch.testing.assert_close(module(image, **arguments), want, rtol=1e-4, atol=1e-5)
    assert len(fired) == 1 and fused_calls == ["patch_embed"]


def test_patch_embed_of_any_size():
    module = patch_embed(strict_img_size=False, output_fmt="NHWC")
    assert module(torch.randn(2, 3, 8, 20)).shape == (2, 1, 5, D) and module.dynamic_feat_size((8, 20)) == (1, 5)
    module = patch_embed(img_size=None)
    assert module.num_patches is None and module(torch.randn(1, 3, 24, 4)).shape == (1, 3, D)
    module.set_input_size((8, 8))
    assert module.grid_size == (1, 2)


X = torch.zeros(2, TOKENS, D)
IMAGE = torch.zeros(2, 3, 16, 24)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: Attention(D, 5), ValueError, "num_heads is 5, expected a divisor of dim, 48"),
        (lambda: Attention(D, 3, qk_norm=True), ValueError, "qk_norm is True"),
        (lambda: Attention(D, 3, scale_norm=True), ValueError, "scale_norm is True"),
        (lambda: Attention(D, 3, gated=True), ValueError, "gated is True"),
        (lambda: Attention(D, 3)(X[0]), ValueError, r"x has shape \(7, 48\), expected \(batch, tokens, 48\)"),
        (lambda: Attention(D, 3)(X, X[0]), ValueError, r"attn_mask has shape \(7, 48\)"),
        (lambda: Attention(D, 3)(X, torch.ones(7, 7).int()), TypeError, "attn_mask has dtype torch.int32"),
        (lambda: Attention(D, 3)(X, torch.ones(7, 7), is_causal=True), ValueError, "only one of them"),
        (lambda: Block(D, 5), ValueError, "num_heads is 5"),
        (lambda: Block(D, 3, qk_norm=True), ValueError, "qk_norm is True"),
        (lambda: Block(D, 3, scale_attn_norm=True), ValueError, "scale_norm is True"),
        (lambda: Block(D, 3, scale_mlp_norm=True), ValueError, "scale_mlp_norm is True"),
        (lambda: Block(D, 3, norm_layer=nn.RMSNorm), TypeError, "norm_layer builds RMSNorm"),
        (lambda: Block(D, 3, norm_layer=partial(nn.LayerNorm, bias=False)), TypeError, "with weight and bias"),
        (lambda: Block(D, 3, attn_layer=nn.MultiheadAttention), TypeError, "attn_layer is .*, expected fastvit.nn.Att"),
        (lambda: Block(D, 3, mlp_layer=None), TypeError, "mlp_layer is None, expected fastvit.nn.Mlp"),
        (lambda: Block(D, 3, norm_layer=None), TypeError, "norm_layer is None, expected a class such as torch.nn.Lay"),
        (lambda: Block(D, 3, norm_layer=nn.LayerNorm(D)), TypeError, r"norm_layer is LayerNorm\(.*, expected a class"),
        (lambda: Block(D, 3, act_layer="gelu"), TypeError, "act_layer is 'gelu', expected a class such as torch.nn.G"),
        (lambda: Block(D, 3, act_layer=nn.GELU()), TypeError, r"act_layer is GELU\(.*, expected a class"),
        (lambda: Block(0, 3), ValueError, "dim is 0, expected a positive integer"),
        (lambda: Block("48", 3), ValueError, "dim is '48', expected a positive integer"),
        (lambda: Block(D, 3.0), ValueError, "num_heads is 3.0, expected a positive integer"),
        (lambda: Block(D, True), ValueError, "num_heads is True, expected a positive integer"),
        (lambda: Block(D, 3, mlp_ratio=0), ValueError, "mlp_ratio is 0, expected a positive number"),
        (lambda: Block(D, 3, mlp_ratio="4"), ValueError, "mlp_ratio is '4', expected a positive number"),
        (lambda: Block(D, 3, mlp_ratio=0.001), ValueError, "hidden_features is 0, expected a positive integer"),
        (lambda: Block(D, 3, drop_path=1.5), ValueError, "drop_path is 1.5, expected a number from 0 to 1"),
        (lambda: Block(D, 3, drop_path="a"), ValueError, "drop_path is 'a', expected a number from 0 to 1"),
        (lambda: Block(D, 3, proj_drop=float("nan")), ValueError, "proj_drop is nan, expected a number from 0 to 1"),
        (lambda: Block(D, 3, attn_drop="a"), ValueError, "attn_drop is 'a', expected a number from 0 to 1"),
        (lambda: Block(D, 3, init_values="a"), ValueError, "init_values is 'a', expected a finite number"),
        (lambda: Block(D, 3)(None), TypeError, r"x is a NoneType, expected a torch.Tensor \(batch, tokens, 48\)"),
        (lambda: Block(D, 3)(X.long()), TypeError, "x has dtype torch.int64, expected floating point"),
        (lambda: Attention(0), ValueError, "dim is 0, expected a positive integer"),
        (lambda: Attention(D, 3, attn_head_dim=0), ValueError, "attn_head_dim is 0, expected a positive integer"),
        (lambda: Attention(D, 3, dim_out="8"), ValueError, "dim_out is '8', expected a positive integer"),
        (lambda: Attention(D, 3)(None), TypeError, "x is a NoneType"),
        (lambda: Attention(D, 3)(X.int()), TypeError, "x has dtype torch.int32"),
        (lambda: Attention(D, 3)(X, "causal"), TypeError, "attn_mask is a str, expected a torch.Tensor or None"),
        (lambda: LayerNormMLP(0), ValueError, "dim is 0, expected a positive integer"),
        (lambda: LayerNormMLP(D, 0), ValueError, "hidden_features is 0, expected a positive integer"),
        (lambda: LayerNormMLP(D, act_layer="silu"), TypeError, "act_layer is 'silu', expected a class"),
        (lambda: LayerNormMLP(D, drop_path=float("nan")), ValueError, "drop_path is nan"),
        (lambda: LayerNormMLP(D)(None), TypeError, r"x is a NoneType, expected a torch.Tensor \(batch, ..., 48\)"),
        (lambda: LayerNormMLP(D)(X.int()), TypeError, "x has dtype torch.int32"),
        (lambda: LayerScale(0), ValueError, "dim is 0, expected a positive integer"),
        (lambda: DropPath("a"), ValueError, "drop_prob is 'a', expected a number from 0 to 1"),
        (lambda: Mlp(D, 0), ValueError, "hidden_features is 0, expected a positive integer"),
        (lambda: Mlp(D, drop=(0.1, 2)), ValueError, "drop is 2, expected a number from 0 to 1"),
        (lambda: Block(D, 3)(X[..., :5]), ValueError, r"x has shape \(2, 7, 5\), expected \(batch, tokens, 48\)"),
        (lambda: LayerNormMLP(D)(X[..., :5]), ValueError, r"x has shape \(2, 7, 5\), expected \(batch, ..., 48\)"),
        (lambda: Mlp(D, norm_layer=nn.LayerNorm), ValueError, "norm_layer is .*, but fastvit's MLP"),
        (lambda: SwiGLU(D, 81), ValueError, "hidden_features is 81, expected a multiple of 2"),
        (lambda: patch_embed(norm_layer=nn.LayerNorm), ValueError, "norm_layer is"),
        (lambda: patch_embed(output_fmt="HWC"), ValueError, "output_fmt is 'HWC', expected one of"),
        (lambda: patch_embed(in_chans=0), ValueError, "in_chans is 0, expected a positive integer"),
        (lambda: patch_embed(embed_dim="48"), ValueError, "embed_dim is '48', expected a positive integer"),
        (lambda: patch_embed(img_size=True), ValueError, "img_size is True, expected a positive integer"),
        (lambda: patch_embed(patch_size=(8, True)), ValueError, r"patch_size is \(8, True\), expected"),
        (lambda: patch_embed(patch_size=5), ValueError, "img_size is 16 x 24, expected multiples of the patch, 5 x 5"),
        (lambda: patch_embed(patch_size=0), ValueError, "patch_size is 0, expected a positive integer"),
        (lambda: patch_embed(img_size=(16, 24, 3)), ValueError, r"img_size is \(16, 24, 3\)"),
        (lambda: patch_embed().set_input_size(patch_size=5), ValueError, "img_size is 16 x 24, expected multiples"),
        (lambda: patch_embed().dynamic_feat_size((16, 25)), ValueError, "img_size is 16 x 25, expected multiples"),
        (lambda: patch_embed()(None), TypeError, "image is a NoneType"),
        (lambda: patch_embed(output_fmt="NHWC")(IMAGE, prefix=IMAGE), ValueError, "prefix came with output_fmt 'NHWC'"),
        (lambda: patch_embed()("cat.jpg"), TypeError, "image is a str"),
        (lambda: patch_embed()(IMAGE.int()), TypeError, "image has dtype torch.int32"),
        (lambda: patch_embed()(IMAGE[0]), ValueError, r"image has shape \(3, 16, 24\), expected \(batch, 3, H, W\)"),
        (lambda: patch_embed()(IMAGE[:, :1]), ValueError, r"image has shape \(2, 1, 16, 24\)"),
        (lambda: patch_embed()(IMAGE[..., :16]), ValueError, "image is 16 x 16, expected 16 x 24"),
        (lambda: patch_embed(strict_img_size=False)(IMAGE[..., :18]), ValueError, "image is 16 x 18, expected mult"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    "form", [{"flatten": False}, *({"output_fmt": name} for name in ("NCHW", "NHWC", "NCL", "NLC")), {}], ids=str
)
def test_patch_embed_has_timms_formats_and_padding(form, hooked):
    timm_layers = pytest.importorskip("timm.layers")
    for size, padded in (((13, 22), True), ((16, 24), True), ((16, 24), False)):
        arguments = {"img_size": size, "patch_size": (8, 4), "embed_dim": D, "dynamic_img_pad": padded, **form}
        ours, theirs = patch_embed(**arguments), timm_layers.PatchEmbed(**arguments)
        theirs.load_state_dict(ours.state_dict())
        if hooked:
            ours.proj.register_forward_hook(lambda *_: None)
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)
        assert ours.dynamic_feat_size(size) == theirs.dynamic_feat_size(size) == ours.grid_size == (2, 6)
        assert ours.num_patches == 12 and ours.flatten == theirs.flatten


@pytest.mark.parametrize("strict", [True, False])
def test_padding_is_what_normalises_to_zero(strict):
    module = patch_embed(img_size=(13, 22), dynamic_img_pad=True, strict_img_size=strict)
    image = torch.randint(256, (2, 3, 13, 22), dtype=torch.uint8)
    scales = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    mean, std = (torch.tensor(values)[:, None, None] for values in scales.values())
    by_hand = F.pad((image / 255 - mean) / std, (0, 2, 0, 3))
    want = module.proj(by_hand).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(image, **scales), want, rtol=1e-4, atol=1e-5)
    if strict:
        with pytest.raises(ValueError, match="image is 13 x 21, expected 13 x 22"):
            module(image[..., :21])


def test_another_patch_size_resamples_the_projection_as_timm_does():
    timm_layers = pytest.importorskip("timm.layers")
    arguments = {"img_size": (16, 24), "patch_size": 8, "embed_dim": D}
    ours, theirs = patch_embed(**arguments), timm_layers.PatchEmbed(**arguments)
    theirs.load_state_dict(ours.state_dict())
    ours.proj.requires_grad_(False)
    for size in ({"patch_size": (4, 12)}, {"img_size": (20, 36)}, {"img_size": 32, "patch_size": 16}):
        for module in (ours, theirs):
            module.set_input_size(**size)
        assert (ours.patch_size, ours.img_size, ours.grid_size) == (
            theirs.patch_size,
            theirs.img_size,
            theirs.grid_size,
        )
        image = torch.randn(2, 3, *ours.img_size)
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)
    assert not ours.proj.weight.requires_grad
    before = copy.deepcopy(ours)
    with pytest.raises(ValueError, match="img_size is 32 x 32, expected multiples of the patch, 5 x 5"):
        ours.set_input_size(patch_size=5)
    assert torch.equal(ours.proj.weight, before.proj.weight) and ours.patch_size == before.patch_size


def test_a_projection_of_other_channels_in_its_place():
    module, image = patch_embed(), torch.randn(2, 4, 16, 24)
    module.proj = nn.Conv2d(4, D, (8, 4), (8, 4))
    torch.testing.assert_close(module(image), module.proj(image).flatten(2).mT, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected \(batch, 4, H, W\)"):
        module(IMAGE)


@pytest.mark.parametrize("change", [{"stride": (4, 4)}, {"padding": (2, 2)}, {"dilation": (2, 2)}])
def test_a_projection_that_overlaps_is_called(change):
    """As dense feature extractors change it in place."""
    module = patch_embed(patch_size=8, output_fmt="NCHW")
    for name, value in change.items():
        setattr(module.proj, name, value)
    torch.testing.assert_close(module(IMAGE + 1), module.proj(IMAGE + 1))


def test_mlp_layers_take_a_bias_and_a_rate_each():
    module = Mlp(D, 80, bias=(True, False), drop=(0.25, 0.5))
    assert module.fc1.bias is not None and module.fc2.bias is None
    assert (module.drop1.p, module.drop2.p) == (0.25, 0.5)


def test_swiglu_takes_its_arguments_in_timms_order():
    timm_layers = pytest.importorskip("timm.layers")
    ours, theirs = (perturbed(layer(D, 80, 20).double()) for layer in (SwiGLU, timm_layers.SwiGLUPacked))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X.double() + 1), theirs(X.double() + 1))


@pytest.mark.parametrize("missing", [{"elementwise_affine": False}, {"bias": False}])
@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_a_norm_without_parameters_takes_part(name, missing):
    module = block().eval()
    setattr(module, name, nn.LayerNorm(D, **missing))
    x = torch.randn(2, TOKENS, D)
    torch.testing.assert_close(module(x), composed(module, x))


def test_attention_dropout_may_be_no_layer_but_no_other_one():
    module, x = block(attn_drop=0.5, drop_path=0.0).train(), torch.randn(2, TOKENS, D)
    module.attn.attn_drop = nn.Identity()
    assert torch.equal(module(x), module(x))
    module.attn.attn_drop = nn.AlphaDropout(0.5)
    with pytest.raises(TypeError, match="attn_drop is AlphaDropout, expected nn.Dropout or nn.Identity"):
        module(x)


def test_a_wrapped_projection_is_called():
    """As adapters do it: a module with a `forward` and nothing else of a Linear."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    module, x = Attention(D, HEADS).eval(), torch.randn(2, TOKENS, D)
    plain = module(x)
    module.proj = Doubled(module.proj)
    module.qkv = Doubled(module.qkv)
    module.qkv.inner.weight.data /= 2
    module.proj.inner.bias.data.zero_()
    assert module(x).shape == plain.shape
    mlp = LayerNormMLP(D).eval()
    want = mlp(x)
    mlp.fc1 = Doubled(mlp.fc1)
    mlp.fc1.inner.weight.data /= 2
    mlp.fc1.inner.bias.data /= 2
    torch.testing.assert_close(mlp(x), want)
    embed = patch_embed()
    want = embed(IMAGE + 1)
    embed.proj = Doubled(embed.proj)
    torch.testing.assert_close(embed(IMAGE + 1), 2 * want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads", [0, -3])
def test_head_counts_below_one_are_refused(num_heads):
    with pytest.raises(ValueError, match="num_heads is"):
        Attention(D, num_heads)


def test_a_hooked_projection_normalises_pixels_in_float32():
    module = PatchEmbed((16, 24), (8, 4), embed_dim=D).bfloat16()
    image = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    scales = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    truth = reference.patch_embed(image, module.proj.weight.double(), module.proj.bias.double(), **scales)

    def error():
        return (module(image, **scales).double() - truth).norm().item()

    fused = error()
    module.proj.register_forward_hook(lambda *_: None)
    assert error() <= 1.1 * fused
