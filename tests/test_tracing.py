"""What other tools make of the modules: torch.fx and the feature extractors on top of it, TorchScript, export."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from samples import outputs_of
from torch import nn

import fastvit
from fastvit import dispatch
from fastvit.nn import Attention, Block, DropPath, LayerNormMLP, LayerScale, Mlp, PatchEmbed, QuickGELU, SwiGLU

timm = pytest.importorskip("timm")

D, HEADS, TOKENS = 48, 3, 7
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": HEADS, "num_classes": 10}
RATES = {"proj_drop": 0.2, "attn_drop": 0.2, "drop_path": 0.4}

X = torch.randn(2, TOKENS, D, dtype=torch.float64)
IMAGE = torch.randn(2, 3, 16, 24, dtype=torch.float64)
MODULES = {
    "block": (lambda: Block(D, HEADS, qkv_bias=True, init_values=0.5, **RATES), X),
    "swiglu_block": (lambda: Block(D, HEADS, mlp_layer=SwiGLU, drop_path=0.4), X),
    "attention": (lambda: Attention(D, HEADS, attn_head_dim=8, attn_drop=0.2), X),
    "layer_norm_mlp": (lambda: LayerNormMLP(D, init_values=0.5, drop_path=0.4), X),
    "branch_alone": (lambda: LayerNormMLP(D, act_layer=QuickGELU, residual=False), X),
    "mlp": (lambda: Mlp(D, 80, drop=0.2), X),
    "swiglu": (lambda: SwiGLU(D, 80, drop=0.2), X),
    "drop_path": (lambda: DropPath(0.4), X),
    "layer_scale": (lambda: LayerScale(D, 0.5), X),
    "patch_embed": (lambda: PatchEmbed((16, 24), 8, embed_dim=D, strict_img_size=False), IMAGE),
    "grid": (lambda: PatchEmbed(None, 8, embed_dim=D, output_fmt="NHWC"), IMAGE),
    "padded": (lambda: PatchEmbed(None, (8, 16), embed_dim=D, flatten=False, dynamic_img_pad=True), IMAGE[..., :13]),
    "pixels": (lambda: PatchEmbed(None, 8, embed_dim=D), IMAGE.mul(50).abs().to(torch.uint8)),
}


def seeded(function, *args, **kwargs):
    torch.manual_seed(11)
    return function(*args, **kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_a_traced_module_gives_its_numbers_and_gradients(name, training):
    build, x = MODULES[name]
    module = build().double().train(training)
    graph = torch.fx.symbolic_trace(module)
    graph = torch.fx.symbolic_trace(copy.deepcopy(graph))  # a graph is a module like any other
    for inputs in (x, x[:1].flip(1), torch.cat([x, x], dim=2 if x.dim() == 4 else 1)):
        want, got = seeded(module, inputs), seeded(graph, inputs)
        torch.testing.assert_close(got, want)
        if want.requires_grad:
            gradients = [
                torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in ((module, want), (graph, got))
            ]
            torch.testing.assert_close(*reversed(gradients))


def test_a_traced_block_runs_on_the_attention_op_and_takes_masks():
    module = Block(D, HEADS).double()
    graph, calls = torch.fx.symbolic_trace(module), []
    with dispatch.watching(lambda op, args: calls.append(op.name)):
        graph(X)
    assert calls == ["attention"]
    assert {"attn.qkv", "mlp.act", "ls2"} <= {node.target for node in graph.graph.nodes if node.op == "call_module"}
    for mask in ({"is_causal": True}, {"attn_mask": torch.rand(2, 1, 1, TOKENS) < 0.7}):
        torch.testing.assert_close(graph(X, **mask), module(X, **mask))
        assert (graph(X, **mask) - graph(X)).abs().max() > 1e-3


def test_a_traced_patch_embedding_takes_what_the_module_takes_and_refuses_what_it_refuses():
    module = PatchEmbed((16, 24), 8, embed_dim=D)
    graph = torch.fx.symbolic_trace(module)
    more = {
        "pos_embed": torch.randn(8, D),
        "prefix": torch.randn(2, D),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.4),
    }
    image = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    torch.testing.assert_close(graph(image, **more), module(image, **more), rtol=1e-4, atol=1e-5)
    assert graph.bfloat16()(image.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="image is 16 x 16, expected 16 x 24"):
        graph(image[..., :16])
    with pytest.raises(TypeError, match="image has dtype torch.int32"):
        graph(image.int())


# timm's own drop path loses its scale in a feature extractor: a statement without a use is taken for dead code.
OURS = {
    "block_fn": {"block_fn": Block, "drop_path_rate": 0.4},
    "attn_layer": {"attn_layer": Attention},
    "embed_layer": {"embed_layer": PatchEmbed},
    "all": {"block_fn": Block, "attn_layer": Attention, "embed_layer": PatchEmbed, "drop_path_rate": 0.4},
}
NODES = ["patch_embed.proj", "blocks.0.mlp.fc1", "blocks.1.attn.proj", "blocks.1.attn.qkv", "blocks.2", "norm", "head"]


def timm_model(**parts):
    return timm.create_model("vit_base_patch16_224", **SMALL, proj_drop_rate=0.2, **parts)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize("model", [*OURS, "fastvit"])
def test_features_by_timms_node_names(model):
    if model == "fastvit":
        model = fastvit.create_model("vit_base_patch16_224", **SMALL, drop_path_rate=0.4, proj_drop_rate=0.2)
    else:
        model = timm_model(**OURS[model])
    extractor = timm.models.create_feature_extractor(model, NODES)
    images = torch.randn(2, 3, 32, 32)
    for training in (True, False):
        got = seeded(extractor.train(training), images)
        want = outputs_of(model.train(training), NODES, lambda m: seeded(m, images))
        assert got.keys() == want.keys()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_timms_graph_features():
    parts = {"features_only": True, "feature_cls": "fx", "out_indices": (0, 2)}
    model = timm_model(**OURS["all"], **parts)
    plain = timm_model(**parts)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


class Inside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


ENTRY_POINTS = {name: MODULES[name] for name in ("block", "attention", "layer_norm_mlp", "patch_embed")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_scripting_is_refused_in_one_sentence(name):
    module = ENTRY_POINTS[name][0]()
    text = rf"^torch.jit.script cannot compile fastvit.nn.{type(module).__name__}, which .*torch.jit.trace under .*$"
    for model in (module, Inside(module)):
        with pytest.raises(RuntimeError, match=text):
            torch.jit.script(model)
        model(ENTRY_POINTS[name][1].float())  # and nothing was changed on the way


def by_jit_trace(module, x):
    file = io.BytesIO()
    with fastvit.use_backend("torch"):
        torch.jit.save(torch.jit.trace(module, x), file)
    file.seek(0)
    return torch.jit.load(file)


def by_export(module, x):
    file = io.BytesIO()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=shapes), file)
    file.seek(0)
    return torch.export.load(file).module()


def by_compile(module, x):
    return torch.compile(module, fullgraph=True, backend="eager")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [by_jit_trace, by_export, by_compile])
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_what_works_in_its_stead(name, way):
    build, x = ENTRY_POINTS[name]
    module, x = build().eval(), x.float()
    other = way(module, x)
    for inputs in (x, torch.cat([x, -x])):
        torch.testing.assert_close(other(inputs), module(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_jit_trace_of_uint8_images_refuses_floats():
    """Which may be normalised already, and the graph would do it once more."""
    model = fastvit.create_model("vit_tiny_patch16_224", **SMALL).eval()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    traced = by_jit_trace(model, pixels[:1])
    torch.testing.assert_close(traced(pixels), model(pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="not implemented for 'Float'"):
        traced(pixels.float())


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_without_a_gradient_or_with_takes_every_size(strict):
    model = fastvit.create_model("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True).eval()
    height, width = (torch.export.Dim(side, min=2, max=9) for side in ("height", "width"))
    shapes = {"x": {2: 8 * height, 3: 8 * width}}
    with torch.set_grad_enabled(strict):
        exported = torch.export.export(model, (torch.randn(1, 3, 32, 32),), dynamic_shapes=shapes, strict=strict)
        for size in ((32, 32), (48, 24)):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-4, atol=1e-5)


def test_compiled_for_every_size_at_once_without_gradients():
    """Only PyTorch's backward of the resampling needs a graph for each."""
    model = fastvit.create_model("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True).eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    with torch.no_grad():
        for size in ((48, 24), (16, 40), (24, 64)):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_a_traced_model_normalises_uint8_images():
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    graph = torch.fx.symbolic_trace(model.eval())
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(graph(pixels), model(pixels), rtol=1e-4, atol=1e-4)
