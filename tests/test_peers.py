"""The peers of the benchmarks: the same numbers from the same weights, and a reason where there can be none.

Those that need a GPU to be installed are run on stand-ins with their documented signatures.
"""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import types
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fastvit.benchmarks import peers
from fastvit.benchmarks.cases import Case
from fastvit.benchmarks.peers import PEERS, absent, build
from samples import gradients
from torch import nn

import fastvit
from fastvit.accuracy import relative_rms
from fastvit.verify import SHORT, randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TIGHT = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative rms beside ours
VIT, DISTILLED, DINOV2 = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2"
REGISTERS, GIANT, HEADLESS = "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2", "vit_small_patch8_224"
FAMILIES = (VIT, DISTILLED, DINOV2, REGISTERS, GIANT, HEADLESS)
# Of the models, those that a CPU runs.
MODELS = [name for name, peer in PEERS.items() if peer.kind != "op" and "cpu" in peer.devices]
EAGER = [name for name in MODELS if name != "timm compiled" and "training" in PEERS[name].modes]


def small(case: Case, **overrides):
    """The case's model, made small, with every parameter mattering to the output, and images."""
    classes = {"num_classes": 10} if case.config.num_classes else {}
    model = fastvit.create_model(case.model, **{**SMALL, **classes, **overrides})
    randomise(model)
    images = torch.randn(case.batch, 3, 32, 32).to(case.dtype)
    return model.to(case.dtype).train(case.mode == "training"), images


def needed(name: str) -> None:
    for package in PEERS[name].packages:
        pytest.importorskip(package)


def cases(names, families=FAMILIES, dtypes=tuple(SHORT), mode="inference") -> list:
    """(peer, case) of whatever a CPU could run, were everything installed."""
    found = []
    for name, model, dtype in product(names, families, dtypes):
        case = Case(model, dtype, 3, mode)
        reason = absent(PEERS[name], case, "cpu")
        if reason is None or reason.startswith("not installed"):
            slow = PEERS[name].compiles and (name.startswith("timm compiled") or (model, dtype) != (VIT, torch.float32))
            marks = [pytest.mark.slow] if slow else []
            found.append(pytest.param(name, case, id=f"{name}-{case.id}".replace(" ", "-"), marks=marks))
    return found


@pytest.mark.parametrize("name, case", cases(MODELS))
def test_logits_are_ours(name, case):
    needed(name)
    ours, images = small(case)
    with torch.no_grad():
        want, built = ours(images), build(PEERS[name], case, ours, None)
        for _ in range(2):  # a second call is as good as the first
            got = built.call(images)
            assert got.shape == want.shape
            assert got.dtype == case.dtype or "float32" in built.note
            assert relative_rms(got, want) < TIGHT[case.dtype]
        # Images that differ are told apart.
        assert relative_rms(built.call(torch.randn_like(images)), want) > 0.1


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name, case", cases([*EAGER, "timm compiled"], (VIT, DISTILLED, DINOV2), DTYPES, "training"))
def test_gradient_of_the_images_is_ours(name, case):
    needed(name)
    ours, images = small(case)
    upstream = torch.randn(ours(images).shape).to(case.dtype)
    results = []
    for call in (ours, build(PEERS[name], case, ours, None).call):
        leaf = images.clone().requires_grad_()
        call(leaf).backward(upstream)
        results.append(leaf.grad)
    assert relative_rms(results[1], results[0]) < 3 * TIGHT[case.dtype]


@pytest.mark.parametrize("name", [name for name in EAGER if name != "timm amp"])
def test_training_has_gradients_of_the_peers_own_weights(name):
    """As many numbers as ours, of the same size; ours stay without."""
    needed(name)
    case = Case(VIT, torch.float32, 3, "training")
    ours, images = small(case)
    out = build(PEERS[name], case, ours, None).call(images)
    leaves, seen, stack = {}, set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        stack += [following for following, _ in node.next_functions]
    out.square().sum().backward()
    norm = sum(leaf.grad.double().square().sum() for leaf in leaves.values()).sqrt()
    assert all(parameter.grad is None for parameter in ours.parameters())
    ours(images).square().sum().backward()
    want = sum(parameter.grad.double().square().sum() for parameter in ours.parameters()).sqrt()
    assert sum(leaf.numel() for leaf in leaves.values()) == sum(parameter.numel() for parameter in ours.parameters())
    torch.testing.assert_close(norm, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [*MODELS, "torch"])
def test_weights_are_copies(name):
    needed(name)
    case = Case(VIT, torch.bfloat16 if name == "timm amp" else torch.float32, 3)
    ours, images = small(case, depth=1)
    with torch.no_grad():
        built = build(PEERS[name], case, ours, None)
        before = built.call(images).clone()
        assert relative_rms(before, ours(images)) < TIGHT[case.dtype]
        for parameter in ours.parameters():
            parameter.zero_()
        torch.testing.assert_close(built.call(images), before, rtol=0, atol=0)
        assert not ours(images).any()


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("timm", {"global_pool": "avg", "norm_eps": 1e-2, "activation": "gelu_tanh", "qkv_bias": False}),
        ("timm", {"mlp": "swiglu", "activation": "silu", "mlp_ratio": 2.5, "class_token": False, "global_pool": "avg"}),
        ("torchvision", {"norm_eps": 1e-2, "mlp_ratio": 3.0}),
        ("transformers", {"norm_eps": 1e-2, "activation": "quick_gelu", "no_embed_class": True, "qkv_bias": False}),
        ("transformers", {"img_size": (32, 48), "patch_size": (8, 4), "mlp_ratio": 3.0}),
        ("onnxruntime", {"global_pool": "avgmax", "norm_eps": 1e-2}),
        ("openvino", {"global_pool": "avgmax", "norm_eps": 1e-2}),
    ],
)
def test_shapes_come_from_our_config(name, overrides):
    """Not from the registry's entry of the case."""
    needed(name)
    case = Case(VIT, torch.float32, 2)
    ours, _ = small(case, **overrides)
    images = torch.randn(2, 3, *ours.config.img_size)
    with torch.no_grad():
        assert relative_rms(build(PEERS[name], case, ours, None).call(images), ours(images)) < TIGHT[torch.float32]


def test_what_differs_is_said():
    case = Case(VIT, torch.bfloat16, 2)
    ours, _ = small(case)
    for name, said in (("timm amp", "float32 weights"), ("openvino", "bf16 inside"), ("timm", "")):
        needed(name)
        try:
            note = build(PEERS[name], case, ours, None).note
        except RuntimeError as error:  # a CPU that has no bfloat16 for it
            assert name == "openvino" and "computes in f32 on this CPU" in str(error)
            continue
        assert (said in note) if said else not note


# Each op with the tensors that a block gives it.
OPS = {
    "attention": lambda: {"qkv": torch.randn(2, 21, 3, 3, 16)},
    "layer_norm": lambda: {"x": torch.randn(2, 21, 24), "weight": torch.rand(24), "bias": torch.randn(24)},
    "layer_norm_linear": lambda: {
        **{"x": torch.randn(2, 21, 24), "norm_weight": torch.rand(24), "norm_bias": torch.randn(24)},
        **{"weight": torch.randn(40, 24), "bias": torch.randn(40)},
    },
    "layer_norm_mlp": lambda: {
        **{"x": torch.randn(2, 21, 24), "norm_weight": torch.rand(24), "norm_bias": torch.randn(24)},
        **{"fc1_weight": torch.randn(40, 24), "fc1_bias": torch.randn(40)},
        **{"fc2_weight": torch.randn(24, 40), "fc2_bias": torch.randn(24)},
        **{"residual": torch.randn(2, 21, 24), "layer_scale": torch.randn(24)},
    },
}


def op_case(op: str, mode="training", model=VIT, dtype=torch.float32) -> Case:
    return Case(model, dtype, 2, mode, op)


def op_results(call, inputs: dict) -> dict[str, torch.Tensor]:
    """Output and gradients of fresh copies of the tensors."""
    fresh = {
        name: value.detach().clone().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    out = call(**fresh)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    leaves = {name: value for name, value in fresh.items() if isinstance(value, torch.Tensor)}
    return {"out": out, **gradients(out, leaves, upstream.to(out))}


def assert_op_agrees(name: str, op: str, options: dict, truth=None):
    inputs = OPS[op]() | options
    built = build(PEERS[name], op_case(op), None, inputs)
    got = op_results(built.call, inputs)
    want = op_results(truth or getattr(fastvit.ops, op), inputs)
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].shape == want[key].shape
        assert relative_rms(got[key], want[key]) < 1e-5, key
    # Tensors come with each call: those that the peer was built with are not kept.
    others = OPS[op]() | options
    assert relative_rms(built.call(**others), (truth or getattr(fastvit.ops, op))(**others)) < 1e-5
    return built


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}], ids=["plain", "scale"])
@pytest.mark.parametrize("name", ["sdpa flash", "sdpa math"])
def test_pinned_attention(name, options):
    assert_op_agrees(name, "attention", options)


def test_attention_is_pinned():
    """A back end that is not there raises; nothing else runs in its place."""
    inputs = OPS["attention"]()
    built = build(PEERS["sdpa cudnn"], op_case("attention"), None, inputs)
    with pytest.raises(RuntimeError):
        built.call(**inputs)


@pytest.mark.parametrize("op", [pytest.param(op, marks=[pytest.mark.slow] if op != "layer_norm" else []) for op in OPS])
def test_the_compiled_op(op):
    assert_op_agrees("compiled", op, {})


def test_the_torch_op_is_on_that_back_end(monkeypatch, triton_backend):
    """Asked for the kernels all round, this peer still runs none."""
    monkeypatch.setattr(fastvit.ops, "layer_norm", lambda: fastvit.dispatch.requested_backend())
    assert build(PEERS["torch"], op_case("layer_norm"), None, OPS["layer_norm"]()).call() == "torch"


@pytest.mark.slow
def test_many_compiled_models_stay_compiled(monkeypatch):
    """More of them than dynamo would recompile one code for: with fullgraph it would raise."""
    needed("timm compiled")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    for batch in range(1, 5):
        case = Case(VIT, torch.float32, batch)
        ours, images = small(case, depth=1)
        with torch.no_grad():
            call = build(PEERS["timm compiled"], case, ours, None).call
            assert relative_rms(call(images), ours(images)) < TIGHT[torch.float32]


def install(monkeypatch, name: str, **contents) -> None:
    """A stand-in for a package, or for a module of one: functions and classes of the documented signatures."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def plain_attention(q, k, v, scale):
    """(B, N, H, d) each, to (B, N, H, d)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def with_flash_attn(monkeypatch):
    def flash_attn_qkvpacked_func(
        qkv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        alibi_slopes=None,
        deterministic=False,
    ):
        assert dropout_p == 0 and not causal
        return plain_attention(*qkv.unbind(2), softmax_scale)

    install(monkeypatch, "flash_attn", flash_attn_qkvpacked_func=flash_attn_qkvpacked_func)


def with_xformers(monkeypatch):
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert attn_bias is None and p == 0
        return plain_attention(query, key, value, scale)

    install(monkeypatch, "xformers")
    install(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        softmax_scale=None,
    ):
        super().__init__()
        assert attn_mask_type == "no_mask" and qkv_format == "bshd" and attention_dropout == 0
        self.sizes, self.scale = (num_attention_heads, kv_channels), softmax_scale

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None):
        assert query_layer.shape[2:] == self.sizes
        return plain_attention(query_layer, key_layer, value_layer, self.scale).flatten(2)


class LayerNormLinear(nn.Module):
    def __init__(self, in_features, out_features, eps=1e-5, bias=True, params_dtype=None, device="cuda"):
        super().__init__()
        like = {"dtype": params_dtype, "device": device}
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **like))
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **like))
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, **like))
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None

    def forward(self, inp, is_first_microbatch=None):
        return F.linear(
            F.layer_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps),
            *(self.weight, self.bias),
        )


class LayerNormMLP(nn.Module):
    def __init__(
        self, hidden_size, ffn_hidden_size, eps=1e-5, bias=True, activation="gelu", params_dtype=None, device="cuda"
    ):
        super().__init__()
        like = {"dtype": params_dtype, "device": device}
        self.eps, self.activation = eps, activation
        self.layer_norm_weight = nn.Parameter(torch.ones(hidden_size, **like))
        self.layer_norm_bias = nn.Parameter(torch.zeros(hidden_size, **like))
        self.fc1_weight = nn.Parameter(torch.zeros(ffn_hidden_size, hidden_size, **like))
        self.fc1_bias = nn.Parameter(torch.zeros(ffn_hidden_size, **like)) if bias else None
        self.fc2_weight = nn.Parameter(torch.zeros(hidden_size, ffn_hidden_size, **like))
        self.fc2_bias = nn.Parameter(torch.zeros(hidden_size, **like)) if bias else None

    def forward(self, inp, is_first_microbatch=None):
        x = F.layer_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        x = F.linear(x, self.fc1_weight, self.fc1_bias)
        x = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "qgelu": lambda x: x * (1.702 * x).sigmoid()}[
            self.activation
        ](x)
        return F.linear(x, self.fc2_weight, self.fc2_bias)


def with_transformer_engine(monkeypatch):
    install(monkeypatch, "transformer_engine")
    modules = (DotProductAttention, LayerNormLinear, LayerNormMLP)
    install(monkeypatch, "transformer_engine.pytorch", **{module.__name__: module for module in modules})
    sys.modules["transformer_engine"].pytorch = sys.modules["transformer_engine.pytorch"]


class AttorchLayerNorm(nn.LayerNorm):
    def __init__(
        self,
        normalized_shape,
        eps=1e-5,
        elementwise_affine=True,
        bias=True,
        autocast_to_fp32=True,
        device="cuda",
        dtype=torch.float32,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)


class AttorchLinear(nn.Linear):
    """Whose weight is (in, out)."""

    def __init__(self, in_features, out_features, bias=True, act_func=None, device="cuda", dtype=torch.float32):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight = nn.Parameter(self.weight.T.contiguous())
        self.act_func = act_func

    def forward(self, input):
        assert self.weight.shape == (self.in_features, self.out_features)
        out = input @ self.weight
        out = out if self.bias is None else out + self.bias
        return out if self.act_func is None else {"gelu": F.gelu, "silu": F.silu}[self.act_func](out)


def with_attorch(monkeypatch):
    install(monkeypatch, "attorch", LayerNorm=AttorchLayerNorm, Linear=AttorchLinear)


def tanh_mlp(**inputs):
    return fastvit.ops.layer_norm_mlp(**inputs | {"activation": "gelu_tanh"})


NO_BIAS = {"fc1_bias": None, "fc2_bias": None}


@pytest.mark.parametrize(
    "name, stand_in, op, options, truth",
    [
        ("flash-attn", with_flash_attn, "attention", {}, None),
        ("flash-attn", with_flash_attn, "attention", {"scale": 0.3}, None),
        ("xformers", with_xformers, "attention", {}, None),
        ("xformers", with_xformers, "attention", {"scale": 0.3}, None),
        ("transformer-engine", with_transformer_engine, "attention", {}, None),
        ("transformer-engine", with_transformer_engine, "attention", {"scale": 0.3}, None),
        ("transformer-engine", with_transformer_engine, "layer_norm_linear", {}, None),
        ("transformer-engine", with_transformer_engine, "layer_norm_linear", {"eps": 0.1, "bias": None}, None),
        ("transformer-engine", with_transformer_engine, "layer_norm_mlp", {}, tanh_mlp),
        ("transformer-engine", with_transformer_engine, "layer_norm_mlp", {"eps": 0.1, **NO_BIAS}, tanh_mlp),
        ("transformer-engine", with_transformer_engine, "layer_norm_mlp", {"activation": "gelu_tanh"}, None),
        ("transformer-engine", with_transformer_engine, "layer_norm_mlp", {"activation": "quick_gelu"}, None),
        ("attorch", with_attorch, "layer_norm", {"eps": 0.1}, None),
        ("attorch", with_attorch, "layer_norm_linear", {"eps": 0.1}, None),
        ("attorch", with_attorch, "layer_norm_linear", {"bias": None}, None),
        ("attorch", with_attorch, "layer_norm_mlp", {"residual": None, "layer_scale": None}, None),
        ("attorch", with_attorch, "layer_norm_mlp", {"eps": 0.1, "activation": "silu", **NO_BIAS}, None),
    ],
)
def test_libraries_of_the_gpu(monkeypatch, name, stand_in, op, options, truth):
    stand_in(monkeypatch)
    assert absent(PEERS[name], op_case(op, dtype=PEERS[name].dtypes[0]), "cuda") is None
    built = assert_op_agrees(name, op, options, truth)
    assert ("tanh GELU" in built.note) == (truth is tanh_mlp)


@pytest.mark.parametrize(
    "name, op, extra, reason",
    [
        ("sdpa math", "attention", {"key_padding_mask": torch.ones(2, 21, dtype=torch.bool)}, "key_padding_mask"),
        ("flash-attn", "attention", {"attn_bias": torch.zeros(21, 21)}, "attn_bias"),
        ("xformers", "attention", {"attn_bias": torch.zeros(21, 21)}, "attn_bias"),
        ("transformer-engine", "attention", {"attn_bias": torch.zeros(21, 21)}, "attn_bias"),
        ("transformer-engine", "layer_norm_mlp", {"fc1_bias": None}, "both biases or none"),
        ("transformer-engine", "layer_norm_mlp", {"fc2_weight": torch.zeros(7, 40)}, "from 24 to 7"),
        ("transformer-engine", "layer_norm_mlp", {"activation": "silu"}, "silu"),
        ("attorch", "layer_norm_mlp", {"activation": "quick_gelu"}, "quick_gelu"),
        ("attorch", "layer_norm_mlp", {"drop_path_scale": torch.ones(2)}, "drop_path_scale"),
    ],
)
def test_arguments_that_a_peer_has_not(monkeypatch, name, op, extra, reason):
    for stand_in in (with_flash_attn, with_xformers, with_transformer_engine, with_attorch):
        stand_in(monkeypatch)
    with pytest.raises(ValueError, match=reason):
        build(PEERS[name], op_case(op), None, OPS[op]() | extra)


@pytest.mark.parametrize(
    "name, case, device, reason",
    [
        ("torch", Case(VIT, torch.float32, 1), "cpu", "runs on cuda, not on cpu"),
        ("timm", op_case("attention"), "cpu", "has models, no ops"),
        ("sdpa math", Case(VIT, torch.float32, 1), "cpu", "has ops, no models"),
        ("timm amp", Case(VIT, torch.float32, 1), "cpu", "takes bf16, fp16, not fp32"),
        ("openvino", Case(VIT, torch.float32, 1, "training"), "cpu", "inference only"),
        ("openvino", Case(VIT, torch.float16, 1), "cpu", "takes fp32, bf16, not fp16"),
        ("sdpa math", op_case("layer_norm"), "cpu", "has no layer_norm"),
        ("sdpa flash", op_case("attention"), "cuda", "has no kernel for float32 on a GPU"),
        ("flash-attn", op_case("attention", dtype=torch.float16), "cuda", "not installed: flash_attn"),
        ("attorch", op_case("attention"), "cuda", "has no attention"),
    ],
)
def test_absent_with_a_reason(name, case, device, reason):
    assert absent(PEERS[name], case, device) == reason


@pytest.mark.parametrize(
    "name, model, reason",
    [
        ("torchvision", REGISTERS, "reg_tokens"),
        ("torchvision", DISTILLED, "distilled"),
        ("torchvision", DINOV2, "init_values"),
        ("torchvision", HEADLESS, "without a classifier"),
    ],
)
def test_models_that_a_peer_has_not(name, model, reason):
    """By the registry, where `absent` is asked, and by our model, where `build` is."""
    needed(name)
    case = Case(model, torch.float32, 2)
    assert reason in absent(PEERS[name], case, "cpu")
    ours, _ = small(case)
    with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
        build(PEERS[name], Case(VIT, torch.float32, 2), ours, None)


@pytest.mark.parametrize(
    "name, overrides, reason",
    [
        ("torchvision", {"global_pool": "avg"}, "global_pool"),
        ("torchvision", {"activation": "gelu_tanh"}, "activation"),
        ("torchvision", {"img_size": (32, 48)}, "square"),
        ("transformers", {"global_pool": "avg"}, "global_pool"),
        ("transformers", {"reg_tokens": 4}, "reg_tokens"),
        ("transformers", {"init_values": 1.0}, "num_classes"),
    ],
)
def test_misfits_are_refused_before_any_work(monkeypatch, name, overrides, reason):
    monkeypatch.setitem(sys.modules, name, None)  # importing it would be an error of another type
    case = Case(VIT, torch.float32, 2)
    ours, _ = small(case, **overrides)
    with pytest.raises(ValueError, match=reason):
        build(PEERS[name], case, ours, None)


def test_onnxruntime_says_that_it_has_no_bfloat16():
    needed("onnxruntime")
    assert "bfloat16" in absent(PEERS["onnxruntime"], Case(VIT, torch.bfloat16, 1), "cpu")
    assert absent(PEERS["onnxruntime"], Case(VIT, torch.float16, 1), "cpu") is None


def test_asking_imports_no_library():
    """Importing the package, and asking every peer, on both devices, whether it can take part."""
    script = """
import sys, torch
from fastvit.benchmarks.cases import Case, OPS
from fastvit.benchmarks.peers import PEERS, absent
for peer in PEERS.values():
    for device in ("cpu", "cuda"):
        for op in ("", *OPS):
            absent(peer, Case("vit_tiny_patch16_224", torch.bfloat16, 1, op=op), device)
print(sorted(set(sys.modules) & {package for peer in PEERS.values() for package in peer.packages}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(torch.version.cuda or torch.version.hip, reason="the shim is for a torch without a GPU's library")
@pytest.mark.parametrize("declared", [(), ("nms",), ("nms", "qnms")], ids=["none", "one", "both"])
def test_torchvision_is_importable_whoever_declared_its_operators_first(declared):
    needed("torchvision")
    script = f"""
import importlib, torch
other = torch.library.Library("torchvision", "DEF") if {declared} else None
for name in {declared}:
    other.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from fastvit import torchvision_shim
torchvision_shim.install()
torchvision_shim.install()
again = importlib.util.module_from_spec(torchvision_shim.__spec__)  # another copy in the same process
torchvision_shim.__spec__.loader.exec_module(again)
again.install()
import torchvision
print(torch.ops.torchvision.nms.default, torch.ops.torchvision.qnms.default)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["torchvision.nms.default", "torchvision.qnms.default"], done.stderr


def test_the_table_is_sound():
    for name, peer in PEERS.items():
        assert name == peer.name and peer.kind in ("model", "op", "both") and peer.what
        assert callable(peers._adapter(peer).build)
