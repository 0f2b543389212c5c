"""A block as one op: what one hands to the next, and precision where folding the norms could cost some."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from fastvit.kernels import transformer_block as kernels
from fastvit.kernels.launch import choice, replay
from samples import BY_NAME

import fastvit
from fastvit import accuracy, ops, reference
from fastvit.accuracy import relative_rms
from fastvit.examples import Draw, tensors

pytestmark = pytest.mark.usefixtures("triton_backend")

STREAMS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 stream": (torch.bfloat16, torch.float32),
    "float32": (torch.float32, torch.float32),
}
streams = pytest.mark.parametrize("dtype, stream", STREAMS.values(), ids=STREAMS)


def block(dtype, stream, device, trained=True, tokens=21, dim=96, hidden=128, gated=False):
    draw = Draw(dtype, device, dtypes={"x": stream}, trained=trained)
    sizes = {"tokens": tokens, "dim": dim, "hidden": hidden, "gated": gated}
    return tensors("transformer_block", draw, batch=2, heads=3, **sizes)


def errors(given: dict, upstream, **options) -> dict[str, tuple[float, float]]:
    """Of the output and every gradient, our error and plain PyTorch's against float64."""
    options = {"num_heads": 3, **options}
    found = [
        accuracy.results(function(**arguments, **options), arguments, lambda shape: upstream)
        for function, arguments in (
            (ops.transformer_block, given),
            (reference.transformer_block, given),
            (reference.transformer_block, accuracy.precise(given)),
        )
    ]
    ours, plain, truth = found
    return {name: tuple(relative_rms(side[name], truth[name]) for side in (ours, plain)) for name in truth}


@streams
@pytest.mark.parametrize("shift", [pytest.param(1.0, marks=pytest.mark.slow), 8.0])
def test_rows_with_a_mean_and_with_outliers(dtype, stream, shift, device):
    """Means of up to 8 sigma, and channels of 60 and 30. Rms errors of eight draws: one channel makes most of a norm's
    gradient, and the ratio of two such errors of one draw is luck."""
    squares: dict[str, list[float]] = {}
    for seed in range(8):
        torch.manual_seed(seed)
        given = block(dtype, stream, device)
        with torch.no_grad():
            x = torch.randn(given["x"].shape, device=device) + shift
            x[..., 5] += 60
            x[..., 17] -= 30
            given["x"] = x.to(stream).requires_grad_()
        for name, pair in errors(given, torch.randn_like(given["x"])).items():
            ours, plain = squares.setdefault(name, [0.0, 0.0])
            squares[name] = [ours + pair[0] ** 2 / 8, plain + pair[1] ** 2 / 8]
    for name, (ours, plain) in squares.items():
        assert ours**0.5 <= accuracy.limit(dtype, plain**0.5, accuracy.rounding(dtype)), name


def test_a_constant_row_is_finite_and_right(device):
    given = block(torch.bfloat16, torch.float32, device)
    with torch.no_grad():
        given["x"][0, 3] = 7.0
    for name, (ours, plain) in errors(given, torch.randn_like(given["x"])).items():
        assert ours <= accuracy.limit(torch.bfloat16, plain), name


def count_streams(monkeypatch) -> list:
    made, original = [], kernels.stream_of
    monkeypatch.setattr(replay, "_KNOWN", False)  # a replay calls nothing by name
    monkeypatch.setattr(kernels, "stream_of", lambda *args: made.append(1) or original(*args))
    return made


@streams
def test_blocks_hand_on_what_they_know(dtype, stream, device, monkeypatch):
    """The next block's row statistics and copy come from the one before; forward and backward are as good."""
    made = count_streams(monkeypatch)
    first, second = block(dtype, stream, device), block(dtype, stream, device)
    x = first.pop("x")
    second.pop("x")

    def run(between=lambda y: y, **how):
        y = between(ops.transformer_block(x, **first, num_heads=3))
        out = ops.transformer_block(y, **second, num_heads=3)
        return [out, *torch.autograd.grad(out, [x, *first.values(), *second.values()], torch.ones_like(out))]

    apart = run()
    assert len(made) == 2
    with ops.carrying():
        together = run()
        assert len(made) == 3
        changed = run(lambda y: 2 * y)  # which is another tensor
        assert len(made) == 5
    assert torch.equal(changed[0], run(lambda y: 2 * y)[0])
    for got, want in zip(together, apart, strict=True):
        assert relative_rms(got, want) <= 4 * accuracy.floor(dtype)


@streams
def test_what_is_changed_in_place_is_not_taken_for_what_was_left(dtype, stream, device, monkeypatch):
    made, given = count_streams(monkeypatch), block(dtype, stream, device)
    given = {name: value.detach() for name, value in given.items()}
    x, found = given.pop("x"), []
    for hand_on in (contextlib.nullcontext(), ops.carrying()):
        with hand_on:
            y = ops.transformer_block(x, **given, num_heads=3)
            y[:, 0].mul_(-3)
            found.append(ops.transformer_block(y, **given, num_heads=3))
    assert torch.equal(*found) and len(made) == 4


def test_a_scale_that_attentions_kernels_do_not_take(device):
    with pytest.raises(RuntimeError, match="scale is -0.5"):
        ops.transformer_block(**block(torch.float32, torch.float32, device), num_heads=3, scale=-0.5)


def test_an_mlp_of_no_hidden_units(device):
    given = block(torch.float32, torch.float32, device, hidden=0)
    with pytest.raises(RuntimeError, match="no hidden units"):
        ops.transformer_block(**given, num_heads=3)
    with fastvit.use_backend("auto"):
        out = ops.transformer_block(**given, num_heads=3)
    assert out.isfinite().all()


def test_a_copy_for_other_products_is_not_taken(device):
    """A float32 block after a bfloat16 one, beside a float32 stream."""
    low, high = block(torch.bfloat16, torch.float32, device), block(torch.float32, torch.float32, device)
    x = low.pop("x").detach()
    high.pop("x")
    low, high = ({name: value.detach() for name, value in given.items()} for given in (low, high))
    found = []
    for hand_on in (contextlib.nullcontext(), ops.carrying()):
        with hand_on:
            y = ops.transformer_block(x, **low, num_heads=3)
            found.append(ops.transformer_block(y, **high, num_heads=3))
    assert torch.equal(*found)


@pytest.mark.parametrize("form", [contextlib.nullcontext, choice.by_library])
@pytest.mark.parametrize("case", ["means and outliers", "small layer-scales", "as drawn"])
def test_float16_where_no_backward_pass_can_come(case, form, device):
    """A layer-scale of 1e-5 would leave the range of folded weights: seen in what a block adds to x."""
    given = block(torch.float16, torch.float16, device, trained=False)
    if case == "means and outliers":
        given["x"] += 8
        given["x"][..., 5] += 60
    elif case == "small layer-scales":
        scales = torch.rand(96, device=device).add(0.5).mul(1e-5).half()
        given |= {"layer_scale1": scales, "layer_scale2": scales.flip(0), "x": given["x"] * 1e-5}

    def error(function, given, truth=None):
        out = function(**given, num_heads=3)
        return out if truth is None else relative_rms(out.double() - given["x"], truth)

    wide = accuracy.precise(given)
    truth = error(reference.transformer_block, wide) - wide["x"]
    with form():
        ours = error(ops.transformer_block, given, truth)
    assert ours <= accuracy.limit(torch.float16, error(reference.transformer_block, given, truth))


def test_a_float16_block_is_one_op_until_a_backward_pass_may_come(device, monkeypatch):
    module = fastvit.nn.Block(48, 3, qkv_bias=True, init_values=1e-5).to(device).half()
    x, calls, original = torch.randn(2, 5, 48, device=device).half(), [], ops.transformer_block
    monkeypatch.setattr(ops, "transformer_block", lambda *args, **how: calls.append(1) or original(*args, **how))
    with torch.no_grad():
        got = module(x)
        with fastvit.use_backend("torch"):
            assert relative_rms(got, module(x)) < 1e-2
    assert len(calls) == 1
    module.requires_grad_(False)
    module(x)
    assert len(calls) == 2
    bias = torch.zeros(5, 5, device=device, dtype=torch.float16, requires_grad=True)
    module(x, attn_mask=bias).sum().backward()
    weight = module.mlp.fc1.weight.detach().clone().requires_grad_()
    del module.mlp.fc1.weight
    module.mlp.fc1.weight = weight  # as parametrizations put one there
    module(x).sum().backward()
    module.ls2.gamma.requires_grad_()
    module(x).sum().backward()
    assert len(calls) == 2 and module.ls2.gamma.grad.isfinite().all() and bias.grad.isfinite().all()


@pytest.mark.parametrize("change", ["float16", "float16 autocast", "mixed", "autocast"])
def test_blocks_whose_dtypes_the_op_does_not_take_run_on_the_single_ops(change, device, monkeypatch):
    module = fastvit.nn.Block(48, 3, qkv_bias=True, init_values=1e-5).to(device)
    x = torch.randn(2, 5, 48, device=device)
    if change == "float16":
        module, x = module.half(), x.half()
        given = block(torch.float16, torch.float16, device)
        with pytest.raises(RuntimeError, match="float16 products"):
            ops.transformer_block(**given, num_heads=3)
    elif change == "float16 autocast":
        module.requires_grad_(False)
    elif change == "mixed":
        module.attn.bfloat16()
    else:
        module, x = module.half(), x.half()  # and no product of float16 x is bfloat16's
    monkeypatch.setattr(ops, "transformer_block", None)
    autocast = torch.float16 if "float16" in change else torch.bfloat16
    with torch.autocast(device, autocast, enabled="autocast" in change):
        got = module(x)
        with fastvit.use_backend("torch"):
            assert relative_rms(got, module(x)) < 1e-2


def test_a_gated_block_is_one_op(device, monkeypatch):
    module = fastvit.nn.Block(48, 3, qkv_bias=True, mlp_layer=fastvit.nn.SwiGLU, init_values=0.1).to(device)
    x, calls, original = torch.randn(2, 5, 48, device=device), [], ops.transformer_block
    monkeypatch.setattr(ops, "transformer_block", lambda *args, **how: calls.append(1) or original(*args, **how))
    found = []
    for backend in ("triton", "torch"):
        with fastvit.use_backend(backend):
            out = module(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    assert len(calls) == 1
    torch.testing.assert_close(*found)


def test_the_library_in_an_operator_called_with_gradients_on(device):
    """As an exported program calls it."""
    given = BY_NAME["layer_norm_linear"].tensors(torch.bfloat16, device)
    with choice.by_library():
        out, *_ = torch.ops.fastvit.layer_norm_linear_forward(given["x"].flatten(0, 1), *list(given.values())[1:], 1e-6)
    assert out.isfinite().all()


def test_a_model_hands_on_unless_somebody_looks(device, monkeypatch):
    made = count_streams(monkeypatch)
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=2).to(device).eval()
    images = torch.randn(1, 3, 32, 32, device=device)
    with torch.no_grad():
        expected = model(images)
        assert len(made) == 1
        seen = []
        handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        torch.testing.assert_close(model(images), expected)
        assert (len(made), len(seen)) == (4, 1)
        handle.remove()
        # One that changes its input in place runs unfused, and the others do not take what is no longer so.
        model.blocks[1].norm1.register_forward_pre_hook(lambda module, inputs: inputs[0].mul_(2))
        with fastvit.use_backend("torch"):
            changed = model(images)
        torch.testing.assert_close(model(images), changed)


def test_nothing_is_kept_where_no_backward_pass_can_come(device):
    operator = BY_NAME["transformer_block"]
    given = {name: value.detach() for name, value in operator.tensors(device=device).items()}
    found = []
    forward = kernels.transformer_block_forward
    flat = (
        given["x"],
        None,
        None,
        None,
        *list(given.values())[1:],
        *[None] * 8,
        False,
        3,
        0.3,
        1e-6,
        1e-6,
        "gelu",
        False,
    )
    for keep in (False, True):
        found.append([value for value in forward(*flat, keep, torch.float32) if value is not None])
    assert len(found[0]) == 4 < len(found[1])
    torch.testing.assert_close(found[0], found[1][:4], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, gated",
    [pytest.param(name, gated, marks=() if gated == (name == "bfloat16") else pytest.mark.slow,
                  id=f"{name} {'gated' if gated else 'plain'}") for name in STREAMS for gated in (False, True)],
)  # fmt: skip
def test_fc1_made_again_keeps_less_and_changes_no_gradient(name, gated, device):
    """12 bytes a token and channel in bfloat16 in place of 20, and an eighth of partial statistics."""
    dtype, stream = STREAMS[name]
    tokens, dim, hidden = 5, 128, 192
    given = block(dtype, stream, device, tokens=tokens, dim=dim, hidden=hidden, gated=gated)
    leaves, upstream = list(given.values()), torch.randn_like(given["x"])
    for scales in ({}, {"layer_scale2": torch.full((dim,), 0.3, dtype=dtype, device=device)}):
        found, kept = [], []
        for recompute in (False, True):
            sizes: dict[int, int] = {}

            def pack(tensor, sizes=sizes):
                if all(tensor.data_ptr() != leaf.data_ptr() for leaf in leaves[1:]):
                    sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = ops.transformer_block(**given, **scales, num_heads=2, recompute_fc1=recompute)
            kept.append(sizes)
            found.append([out, *torch.autograd.grad(out, leaves, upstream)])
        assert all(map(torch.equal, *found))
        saved = sum(kept[0].values()) - sum(kept[1].values())
        rows = 2 * tokens
        assert saved == rows * ((1 + gated) * hidden * dtype.itemsize - 2 * kernels.groups_of(dim) * 4)


def test_a_model_that_makes_fc1_again(device, monkeypatch):
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_classes": 3}
    model = fastvit.create_model("vit_tiny_patch16_224", **size).to(device)
    original, asked = ops.transformer_block, []

    def note(*args, recompute_fc1, **how):
        asked.append(recompute_fc1)
        return original(*args, recompute_fc1=recompute_fc1, **how)

    monkeypatch.setattr(ops, "transformer_block", note)
    images, found = torch.randn(1, 3, 32, 32, device=device), []
    for enable in (False, "fc1", True):
        model.set_grad_checkpointing(enable)
        assert [block.recompute_fc1 for block in model.blocks] == [enable == "fc1"] * 2
        assert model.grad_checkpointing == (enable is True)
        found.append(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))
        assert set(asked) == {enable == "fc1"}
        asked.clear()
    assert all(map(torch.equal, found[0], found[1]))
    torch.testing.assert_close(found[0], found[2])
    with pytest.raises(ValueError, match="'fc2'"):
        model.set_grad_checkpointing("fc2")


def tiny(dtype, device):
    """A model of one block, and an image."""
    config = {"img_size": 16, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 3, "num_classes": 0}
    model = fastvit.create_model("vit_tiny_patch16_224", **config).to(device, dtype).eval()
    with torch.no_grad():
        model.pos_embed.normal_()  # rows with a variance
    return model, torch.randn(2, 3, 16, 16, device=device, dtype=dtype)


@pytest.mark.parametrize("form", [contextlib.nullcontext, choice.by_library])
def test_the_embedding_hands_on_its_rows_statistics(form, device, monkeypatch):
    made, (model, image) = count_streams(monkeypatch), tiny(torch.bfloat16, device)
    with form():
        out = model(image)
        assert not made
        out.sum().backward()
    with fastvit.use_backend("torch"):
        plain, truth = model(image), copy.deepcopy(model).double()(image.double())
    assert relative_rms(out, truth) <= accuracy.limit(torch.bfloat16, relative_rms(plain, truth))


@pytest.mark.parametrize("who", ["a hook", "a module", "a subclass", "nobody, but products read a copy"])
def test_tokens_that_somebody_may_change_begin_anew(who, device, monkeypatch):
    """In inference mode nobody can see that they did."""
    dtype = torch.float32 if "copy" in who else torch.bfloat16
    made, (model, image) = count_streams(monkeypatch), tiny(dtype, device)

    class Changing(torch.nn.Identity):
        def forward(self, x):
            return x.mul_(torch.arange(1, 97, device=x.device, dtype=x.dtype) / 32)

    class Subclass(type(model)):
        def embed(self, *args):
            return Changing()(super().embed(*args))

    if who == "a hook":
        model.pos_drop.register_forward_hook(lambda module, args, out: Changing()(out))
    elif who == "a module":
        model.norm_pre = Changing()
    elif who == "a subclass":
        model.__class__ = Subclass
    with torch.inference_mode():
        out = model(image)
        assert len(made) == 1
        assert relative_rms(out, model.norm(model.blocks[0](model.embed(image)))[:, 0]) <= accuracy.floor(dtype)
