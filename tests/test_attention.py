"""attention beyond the contract: head dims, lengths, tilings, masks and biases, extreme scores, bad input."""

import math

import numpy as np
import pytest
import torch
from fastvit.benchmarks import attention_tiles
from fastvit.kernels import attention as kernels
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.request import AttentionConfig, split_head

import fastvit
from fastvit import ops, reference
from fastvit.accuracy import FACTOR, limit, relative_rms, rounding
from fastvit.dispatch import interpreting
from fastvit.examples import ROPE
from fastvit.interpret import sanitizer

pytestmark = pytest.mark.usefixtures("triton_backend")


def run(function, qkv, upstream, **kwargs):
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, **kwargs)
    return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out))[0]


def assert_matches(qkv, **kwargs):
    """Output and gradient against float64; the bar is plain PyTorch in the same dtype."""
    dtype = qkv.dtype
    shape = (qkv.shape[0], kwargs.get("num_queries", qkv.shape[1]), qkv.shape[3] * qkv.shape[4])
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(qkv)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    truth = run(reference.attention, qkv.double(), upstream, **wide)
    # SDPA with a bias computes in float32 whatever the dtype; the formula in the dtype is the bar there.
    plain_op = reference.attention if "attn_bias" in kwargs else ops.attention
    with fastvit.use_backend("torch"):
        plain = run(plain_op, qkv, upstream, **kwargs)
    ours = run(ops.attention, qkv, upstream, **kwargs)
    for t, p, o in zip(truth, plain, ours, strict=True):
        assert relative_rms(o, t) <= limit(dtype, relative_rms(p, t), rounding(dtype))
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 72, 80, 88, 96, 104, 112, 128])
def test_head_dims(head_dim, dtype, device):
    assert_matches(torch.randn(1, 37, 3, 2, head_dim, device=device).to(dtype))


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 197, 257])
def test_lengths(tokens, device):
    assert_matches(torch.randn(2, tokens, 3, 2, 32, device=device).bfloat16())


ONE_TILE_A_PROGRAM = [
    AttentionConfig(64, 64, 4, 3),
    AttentionConfig(64, 32, 4, 1),
    AttentionConfig(64, 128, 4, 2),  # wider than the keys after a class token
]
# The last with tiles so small that each kind is made many times.
ALL_KEYS_ON_CHIP = [
    AttentionConfig(64, 64, 4, 1, 8),
    AttentionConfig(64, 128, 4, 1, 2),
    AttentionConfig(32, 32, 4, 1, 4),
]
LENGTHS = (16, 33, 64, 129, 196, 198, 256, 258, 577, 1025, 1370, 4097)
SLOW = [pytest.param(tokens, marks=pytest.mark.slow) for tokens in LENGTHS]


@pytest.mark.parametrize("tokens", [1, 2, 17, 65, 197, 257, *SLOW])
def test_every_tiling_of_every_length(tokens, device):
    """Output and log-sum-exp of the forward kernel in each of its forms, of a whole head and of one that is padded."""
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float32, 24)):
        qkv = torch.randn(1, tokens, 3, 1, head_dim, device=device).to(dtype)
        q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
        truth = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        plain = relative_rms(reference.attention(qkv), truth)
        for config in ONE_TILE_A_PROGRAM + ALL_KEYS_ON_CHIP if tokens < 1000 else ONE_TILE_A_PROGRAM[:1]:
            given, (out, lse) = kernels.forward(qkv, head_dim**-0.5, kernels.Options())
            out.fill_(float("nan"))
            kernels.launch(*given, config=config)
            assert relative_rms(out, truth) <= limit(dtype, plain, rounding(dtype)), config
            error = (lse[..., :tokens] - scores.logsumexp(-1) / math.log(2)).abs().max()
            assert error < 3e-6, config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [17, 65])
def test_masks_in_every_tiling(tokens, dtype, device):
    qkv = torch.randn(2, tokens, 3, 1, 16, device=device).to(dtype)
    mask = torch.rand(2, tokens, device=device) < 0.7
    mask[:, tokens // 2] = True
    bias = torch.randn(1, tokens, tokens, device=device).to(dtype)
    bias[:, 3] = float("-inf")  # a query that sees nothing
    for key_padding_mask, attn_bias in ((mask, None), (None, bias), (mask, bias)):
        masks = {"key_padding_mask": key_padding_mask, "attn_bias": attn_bias}
        truth = reference.attention(qkv.double(), **masks)
        plain = relative_rms(reference.attention(qkv, **masks), truth)
        for config in ONE_TILE_A_PROGRAM[1:]:
            given, (out, lse) = kernels.forward(qkv, 0.25, kernels.Options(key_padding_mask, attn_bias))
            out.fill_(float("nan"))
            kernels.launch(*given, config=config)
            assert relative_rms(out, truth) <= limit(dtype, plain, rounding(dtype)), (config, masks)
            if attn_bias is not None:
                assert not out[:, 3].any() and (lse[:, :, 3] == float("inf")).all()


# Scores that are made over those that are asked for, of ViT-B at batch 256. Products of Hopper's have 64 rows, which is
# what 197 tokens cannot fill.
AREA = {197: 1.38, 257: 1.0, 577: 1.0, 1025: 1.0, 1370: 1.08}


def test_how_much_of_the_work_is_padding():
    for tokens, most in AREA.items():
        config, fit, area = attention_tiles.of_head(tokens, ARCHS["sm_90"])
        print(f"{tokens} tokens: {fit.tiles} x {config.BLOCK_ROWS} queries, keys {fit.widths}: {area:.2f}")
        assert most - 0.06 < area <= most
        covered = fit.peeled + sum(fit.widths)
        assert tokens <= covered < tokens + 64 and (covered == tokens) != fit.ragged
        assert fit.tiles * config.BLOCK_ROWS + fit.peeled >= tokens
    for head_dim in (32, 48, 64, 72, 80, 88, 96, 104, 112, 128):
        assert head_dim <= sum(split_head(head_dim)) <= 1.12 * head_dim


@pytest.mark.skipif(not interpreting(), reason="counts what the interpreter loads and stores")
@pytest.mark.parametrize("tokens", [64, 197, 257, 321])
def test_with_all_keys_on_chip_everything_is_read_once(tokens, device, monkeypatch):
    counted = 0
    access = sanitizer._Launch.access

    def count(launch, action, pointers, mask, size):
        nonlocal counted
        counted += np.broadcast_to(mask, np.shape(pointers)).sum() * size
        return access(launch, action, pointers, mask, size)

    monkeypatch.setattr(sanitizer._Launch, "access", count)
    given, (out, lse) = kernels.forward(
        torch.randn(1, tokens, 3, 2, 64, device=device).bfloat16(), 0.125, kernels.Options()
    )
    kernels.launch(*given, config=AttentionConfig(64, 64, 4, 1, 8))
    least = 4 * out.numel() * 2 + 2 * tokens * 4
    assert least <= counted <= 1.05 * least


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-46])
def test_a_scale_that_is_not_positive_runs_in_torch(scale, device):
    qkv = torch.randn(1, 5, 3, 2, 16, device=device)
    with pytest.raises(RuntimeError, match=f"scale is {scale}"):
        ops.attention(qkv, scale=scale)
    with fastvit.use_backend("auto"):
        assert relative_rms(ops.attention(qkv, scale=scale), reference.attention(qkv, scale=scale)) < 1e-6


def test_qkv_of_a_linear_layer_is_read_in_place(device):
    """A view of (B, N, 3 * H * d), and one whose heads and halves are permuted."""
    packed = torch.randn(2, 21, 3 * 2 * 32, device=device)
    expected = assert_matches(packed.view(2, 21, 3, 2, 32))
    permuted = packed.view(2, 21, 3, 2, 32).permute(3, 0, 2, 1, 4).contiguous().permute(1, 3, 2, 0, 4)
    for got, want in zip(assert_matches(permuted), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "shape", [(), (21,), (1,), (21, 21), (2, 21, 21), (1, 1, 21, 21), (3, 1, 1, 21), (3, 2, 21, 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_broadcasts_and_has_a_gradient(shape, dtype, device):
    qkv = torch.randn(3, 21, 3, 2, 16, device=device).to(dtype)
    bias = torch.randn(shape, device=device).to(dtype)
    assert_matches(qkv, attn_bias=bias)
    grads = []
    for function, to in ((reference.attention, torch.float64), (reference.attention, dtype), (ops.attention, dtype)):
        leaf = bias.detach().to(to).requires_grad_()
        function(qkv.to(to), attn_bias=leaf).square().sum().backward()
        grads.append(leaf.grad)
    truth, plain, ours = grads
    assert ours.shape == shape
    if ours.numel() == 1:  # what is added to every score changes nothing: terms that cancel
        full = torch.zeros(3, 2, 21, 21, dtype=torch.float64, device=device, requires_grad=True)
        reference.attention(qkv.double(), attn_bias=full).square().sum().backward()
        assert ours.abs() <= torch.finfo(dtype).eps * full.grad.abs().sum()
        return
    assert relative_rms(ours, truth) <= FACTOR[dtype] * relative_rms(plain, truth)


@pytest.mark.parametrize("shape", [(), (21,), (1,), (21, 1), (2, 1, 21), (3, 1, 21, 21)], ids=str)
def test_the_torch_back_end_takes_every_bias(shape, device):
    qkv = torch.randn(3, 21, 3, 2, 16, device=device)
    bias = torch.randn(shape, device=device, requires_grad=True)
    mask = torch.rand(3, 21, device=device) < 0.8
    mask[:, 0] = True
    for padding in (None, mask):
        with fastvit.use_backend("torch"):
            out = ops.attention(qkv, attn_bias=bias, key_padding_mask=padding)
        expected = reference.attention(qkv, attn_bias=bias, key_padding_mask=padding)
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(out)
        torch.testing.assert_close(*(torch.autograd.grad(o, bias, upstream)[0] for o in (out, expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_error_in_half_precision_does_not_depend_on_the_layout(dtype, spread, device):
    """The bar is PyTorch's fused attention on contiguous tensors, for strided ones and a float32 bias of zeros too."""
    qkv = (spread * torch.randn(1, 197, 3, 2, 64, device=device)).to(dtype)
    strided = torch.empty(1, 197, 3, 2, 128, dtype=dtype, device=device)[..., ::2].copy_(qkv)
    permuted = qkv.permute(3, 0, 2, 1, 4).contiguous().permute(1, 3, 2, 0, 4)
    upstream = torch.randn(1, 197, 128, device=device).to(dtype)
    truth = run(reference.attention, qkv.double(), upstream)
    with fastvit.use_backend("torch"):
        bar = run(ops.attention, qkv, upstream)
    bias = torch.zeros(197, 197, device=device)
    for layout, options in ((qkv, {}), (strided, {}), (permuted, {}), (qkv, {"attn_bias": bias})):
        got = run(ops.attention, layout, upstream, **options)
        assert relative_rms(got[0], truth[0]) <= FACTOR[dtype] * relative_rms(bar[0], truth[0])
        for part in range(3):  # dq, dk, dv
            error, plain = (relative_rms(grad[:, :, part], truth[1][:, :, part]) for grad in (got[1], bar[1]))
            assert error <= FACTOR[dtype] * plain


def test_masked_keys_do_not_count(device):
    qkv = torch.randn(2, 70, 3, 2, 32, device=device)
    mask = torch.ones(2, 70, dtype=torch.bool, device=device)
    mask[0, 40:] = False
    out, grad = assert_matches(qkv, key_padding_mask=mask)
    short, _ = assert_matches(qkv[:1, :40])
    assert relative_rms(out[:1, :40], short) < 1e-6
    assert not grad[0, 40:, 1:].any()  # no gradient to masked keys and values
    poisoned = qkv.clone()
    poisoned[0, 40:, 1:] = 1e4
    assert relative_rms(ops.attention(poisoned, key_padding_mask=mask)[:, :40], out[:, :40]) < 1e-6


@pytest.mark.parametrize("how", ["mask", "bias"])
def test_a_query_with_no_key_gets_zeros(how, device):
    qkv = torch.randn(2, 37, 3, 2, 16, device=device)
    if how == "mask":
        mask = torch.ones(2, 37, dtype=torch.bool, device=device)
        mask[1] = False
        kwargs = {"key_padding_mask": mask}
        dead = (1, slice(None))
    else:
        bias = torch.zeros(37, 37, device=device)
        bias[5] = float("-inf")
        kwargs = {"attn_bias": bias}
        dead = (slice(None), 5)
    out, grad = run(ops.attention, qkv, torch.ones(2, 37, 32), **kwargs)
    expected, expected_grad = run(reference.attention, qkv, torch.ones(2, 37, 32), **kwargs)
    assert not out[dead].any()
    assert relative_rms(out, expected) < 1e-6
    assert relative_rms(grad, expected_grad) < 1e-6
    with fastvit.use_backend("torch"):
        assert relative_rms(run(ops.attention, qkv, torch.ones(2, 37, 32), **kwargs)[0], expected) < 1e-6


def test_scores_far_beyond_exp_do_not_overflow(device):
    qkv = torch.randn(1, 70, 3, 1, 16, device=device) * 30
    out, grad = assert_matches(qkv)
    assert out.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_scores_far_from_zero(score, device):
    """All of them: what stands in for keys and queries behind the last has a score of 0."""
    qkv = torch.randn(1, 21, 3, 1, 16, device=device)
    qkv[:, :, 0] += 50
    qkv[:, :, 1] += score / 200
    out, grad = assert_matches(qkv)
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_what_the_kernels_lack_runs_in_torch(device):
    wide = torch.randn(1, 5, 3, 1, 160, device=device)
    explanation = fastvit.explain("attention", wide)
    assert explanation.backend == "torch"
    assert [reason for reason in explanation.reasons if "160" in reason]
    with pytest.raises(RuntimeError, match="head dimension 160"):
        ops.attention(wide)
    with fastvit.use_backend("auto"):
        assert relative_rms(ops.attention(wide), reference.attention(wide)) < 1e-6


def tables(tokens, head_dim, device, batch=()):
    """cos and sin of random angles."""
    angles = 6 * torch.rand(*batch, tokens, head_dim // 2, device=device)
    return {"rope_cos": angles.cos(), "rope_sin": angles.sin()}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [6, 64, 72])
def test_rotary_embedding(head_dim, dtype, interleaved, device):
    """Of the tokens after five, over two tiles; and each image by a table of its own."""
    qkv = torch.randn(2, 69, 3, 1, head_dim, device=device).to(dtype)
    for batch in ((), (2,)) if head_dim == 6 else ((),):
        assert_matches(qkv, **tables(64, head_dim, device, batch), rope_interleaved=interleaved)


def test_rotary_tables_of_any_strides_and_dtype(device):
    """As slices of tables with every angle twice, as DINOv3 and EVA-02 have them."""
    qkv = torch.randn(2, 37, 3, 2, 16, device=device)
    made = tables(36, 16, device)
    expected = ops.attention(qkv, **made)
    halves = {name: torch.cat([angle, angle], dim=-1)[:, :8] for name, angle in made.items()}
    assert torch.equal(ops.attention(qkv, **halves), expected)
    every_other = {name: angle.repeat_interleave(2, -1)[:, ::2] for name, angle in made.items()}
    assert torch.equal(ops.attention(qkv, **every_other), expected)
    assert torch.equal(ops.attention(qkv, **{**made, "rope_sin": halves["rope_sin"]}), expected)
    doubles = {name: angle[None].double() for name, angle in made.items()}
    assert relative_rms(ops.attention(qkv, **doubles), expected) < 1e-6


def test_rotary_embedding_as_timm_and_transformers_have_it(device):
    """Their own functions on q and k, by timm's table (sin beside cos, every angle twice) and transformers' pair."""
    layers = pytest.importorskip("timm.layers")
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    qkv = torch.randn(2, 21, 3, 2, 16, device=device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    angles = 6 * torch.rand(16, 8, device=device)

    def attend(q, k):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def rotated(x, half, repeat):
        table = torch.cat([repeat(angles.sin()), repeat(angles.cos())], dim=-1)
        return torch.cat([x[:, :, :5], layers.apply_rot_embed_cat(x[:, :, 5:], table, half=half)], dim=2)

    given = {"rope_cos": angles.cos(), "rope_sin": angles.sin()}
    eva = [rotated(x, False, lambda angle: angle.repeat_interleave(2, -1)) for x in (q, k)]
    assert relative_rms(ops.attention(qkv, **given, rope_interleaved=True), attend(*eva)) < 1e-6
    halves = [rotated(x, True, lambda angle: angle.repeat(1, 2)) for x in (q, k)]
    assert relative_rms(ops.attention(qkv, **given), attend(*halves)) < 1e-6
    theirs = dinov3.apply_rotary_pos_emb(q, k, angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    assert relative_rms(ops.attention(qkv, **given), attend(*theirs)) < 1e-6


def test_a_rotary_embedding_that_is_trained_runs_in_torch(device):
    qkv = torch.randn(1, 9, 3, 2, 8, device=device)
    given = {name: table.requires_grad_() for name, table in tables(9, 8, device).items()}
    with pytest.raises(RuntimeError, match="rotary embedding requires a gradient"):
        ops.attention(qkv, **given)
    with fastvit.use_backend("auto"):
        grads = [
            torch.autograd.grad(f(qkv, **given).square().sum(), given.values())
            for f in (ops.attention, reference.attention)
        ]
    for ours, theirs in zip(*grads, strict=True):
        assert relative_rms(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_queries", [1, 64, 65, 69])
def test_queries_of_the_first_tokens_alone(num_queries, dtype, device):
    """As those rows of all; the others' dq is 0, whatever was in memory."""
    qkv = torch.randn(2, 70, 3, 2, 32, device=device).to(dtype)
    out, grad = assert_matches(qkv, num_queries=num_queries)
    assert out.shape == (2, num_queries, 64)
    assert not grad[:, num_queries:, 0].any() and grad[:, :, 1:].any(dim=-1).all()


PAIRS = {
    "mask and query": ("mask", "queries"),
    "bias and queries": ("bias", "queries"),
    "mask and rotary": ("mask", "rotary"),
    "bias and rotary": ("bias", "rotary"),
    "queries and rotary": ("queries", "rotary"),
    "all": ("mask", "bias", "queries", "rotary"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_options_in_pairs(pair, dtype, device):
    qkv = torch.randn(2, 70, 3, 2, 16, device=device).to(dtype)
    queries = 67 if "queries" in pair else 70
    mask = torch.rand(2, 70, device=device) < 0.7
    mask[:, 3] = True
    options = {
        "mask": {"key_padding_mask": mask},
        "bias": {"attn_bias": torch.randn(2, queries, 70, device=device).to(dtype)},
        "queries": {"num_queries": queries},
        "rotary": tables(66, 16, device),
    }
    given = {}
    for option in pair:
        given |= options[option]
    assert_matches(qkv, **given)
    if "bias" in pair:
        grads = []
        for function, to in (
            (reference.attention, torch.float64),
            (reference.attention, dtype),
            (ops.attention, dtype),
        ):
            as_given = {n: t.to(to) if n == "attn_bias" else t for n, t in given.items()}
            leaf = as_given["attn_bias"] = as_given["attn_bias"].detach().requires_grad_()
            function(qkv.to(to), **as_given).square().sum().backward()
            grads.append(leaf.grad)
        truth, plain, got = grads
        assert relative_rms(got, truth) <= FACTOR[dtype] * relative_rms(plain, truth)


def dropped(qkv, rate, seed, upstream=None, **options):
    """`attention` with dropout, by this seed, and its gradient."""
    leaf = qkv.detach().requires_grad_()
    torch.manual_seed(seed)
    out = ops.attention(leaf, dropout_p=rate, **options)
    return out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out) if upstream is None else upstream)[0]


def factors(tokens, heads, rate, seed, device):
    """Dropout's (1, H, N, N), as the kernels have it: with equal scores and unit vectors for values."""
    qkv = torch.zeros(1, tokens, 3, heads, 128, device=device)
    qkv[:, :, 2] = torch.eye(tokens, 128, device=device)[:, None]
    out = dropped(qkv, rate, seed)[0].view(tokens, heads, 128)[..., :tokens]
    return out.transpose(0, 1)[None] * tokens


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate, device):
    """The rate, and no more than chance between heads, queries, keys, seeds; the same mask in the backward pass."""
    tokens, heads = 70, 2
    mask = factors(tokens, heads, rate, 1, device)
    keep = mask != 0
    torch.testing.assert_close(mask[keep], torch.full_like(mask[keep], 1 / (1 - rate)), rtol=1e-5, atol=0)
    variance = rate * (1 - rate)
    for sample in (keep, keep[:, 0], keep[..., 7], keep[..., 9, :]):
        assert abs(sample.double().mean() - (1 - rate)) < 3.5 * math.sqrt(variance / sample.numel())
    other = factors(tokens, heads, rate, 2, device) != 0
    for a, b in (
        (keep[:, 0], keep[:, 1]),
        (keep[..., 1:], keep[..., :-1]),
        (keep[:, :, 1:], keep[:, :, :-1]),
        (keep, other),
    ):
        together = ((a.double() - (1 - rate)) * (b.double() - (1 - rate))).mean() / variance
        assert abs(together) < 4 / math.sqrt(a.numel())

    qkv = torch.randn(1, tokens, 3, heads, 16, device=device)
    upstream = torch.randn(1, tokens, heads * 16, device=device)
    wide = qkv.double().requires_grad_()
    q, k, v = wide.permute(2, 0, 3, 1, 4)
    expected = ((q @ k.transpose(-1, -2) / 4).softmax(-1) * mask.double() @ v).transpose(1, 2).flatten(2)
    out, grad = dropped(qkv, rate, 1, upstream)
    assert relative_rms(out, expected.detach()) < 1e-5
    assert relative_rms(grad, torch.autograd.grad(expected, wide, upstream.double())[0]) < 1e-5
    again = dropped(qkv, rate, 1, upstream)
    assert torch.equal(out, again[0]) and torch.equal(grad, again[1])


def test_dropout_with_the_other_options(device):
    """Of a padding mask, a bias, a rotary embedding and few queries: the same mask, and it is replayed."""
    tokens, queries, rate = 70, 66, 0.3
    mask = factors(tokens, 2, rate, 3, device)[..., :queries, :]
    allowed = torch.rand(1, tokens, device=device) < 0.8
    allowed[:, 0] = True
    options = {"key_padding_mask": allowed, "attn_bias": torch.randn(queries, tokens, device=device)}
    options |= {"num_queries": queries, **tables(tokens - 1, 16, device)}
    qkv = torch.randn(1, tokens, 3, 2, 16, device=device)
    wide = qkv.double().requires_grad_()
    q, k, v = wide.permute(2, 0, 3, 1, 4)
    cos, sin = options["rope_cos"].double(), options["rope_sin"].double()
    q, k = (reference.ops.rotate(x, cos, sin) for x in (q, k))
    bias = options["attn_bias"].double()
    p = reference.ops.attention_probabilities(q[:, :, :queries], k, 0.25, allowed, bias)
    expected = (p * mask.double() @ v).transpose(1, 2).flatten(2)
    out, grad = dropped(qkv, rate, 3, **options)
    assert relative_rms(out, expected.detach()) < 1e-5
    assert relative_rms(grad, torch.autograd.grad(expected.sum(), wide)[0]) < 1e-5


def test_dropout_has_no_second_derivative(device):
    qkv = torch.randn(1, 9, 3, 2, 8, device=device, requires_grad=True)
    out = ops.attention(qkv, dropout_p=0.2)
    with pytest.raises(NotImplementedError, match="dropout has neither a second derivative"):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"qkv": torch.zeros(2, 5, 2, 1, 8)},
            ValueError,
            r"qkv must have shape \(B, N, 3, H, d\), got \(2, 5, 2, 1, 8\)",
        ),
        ({"qkv": torch.zeros(2, 5, 24)}, ValueError, r"qkv must have shape \(B, N, 3, H, d\)"),
        ({"qkv": torch.zeros(2, 5, 3, 1, 0)}, ValueError, "head dimension of at least 1"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"key_padding_mask": [1, 1]}, TypeError, "key_padding_mask must be a torch.Tensor, got list"),
        ({"key_padding_mask": torch.ones(2, 5)}, TypeError, "key_padding_mask must be bool"),
        ({"key_padding_mask": torch.ones(2, 6, dtype=torch.bool)}, ValueError, r"\(B, N\) = \(2, 5\), got \(2, 6\)"),
        ({"attn_bias": torch.zeros(4, 5)}, ValueError, r"attn_bias must broadcast to .* got \(4, 5\)"),
        ({"attn_bias": torch.zeros(1, 2, 1, 5, 5)}, ValueError, "attn_bias must broadcast"),
        ({"attn_bias": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "attn_bias must have a floating-point dtype"),
        (
            {"attn_bias": torch.zeros(5, 5), "num_queries": 3},
            ValueError,
            r"broadcast to \(B, H, M, N\) = \(2, 1, 3, 5\)",
        ),
        ({"num_queries": 0}, ValueError, "num_queries must be from 1 to N = 5, got 0"),
        ({"num_queries": 6}, ValueError, "num_queries must be from 1 to N = 5, got 6"),
        ({"num_queries": 2.0}, TypeError, "num_queries must be an integer or None, got 2.0"),
        ({"num_queries": True}, TypeError, "num_queries must be an integer or None, got True"),
        ({"rope_interleaved": 1}, TypeError, "rope_interleaved must be True or False, got 1"),
        ({"rope_cos": torch.zeros(4, 4)}, ValueError, "rope_cos and rope_sin must come together"),
        (
            dict.fromkeys(ROPE, torch.zeros(6, 4)),
            ValueError,
            r"with R at most N = 5, B = 2 and d / 2 = 4, got \(6, 4\)",
        ),
        (dict.fromkeys(ROPE, torch.zeros(4, 8)), ValueError, r"d / 2 = 4, got \(4, 8\)"),
        (dict.fromkeys(ROPE, torch.zeros(3, 4, 4)), ValueError, r"B = 2 .* got \(3, 4, 4\)"),
        (dict.fromkeys(ROPE, torch.zeros(4, 4, dtype=torch.int32)), TypeError, "rope_cos must have a floating-point"),
        (
            {"rope_cos": torch.zeros(4, 4), "rope_sin": torch.zeros(3, 4)},
            ValueError,
            "rope_sin must have rope_cos's shape",
        ),
        (
            {"qkv": torch.zeros(2, 5, 3, 1, 7), **dict.fromkeys(ROPE, torch.zeros(4, 3))},
            ValueError,
            "needs an even head dimension, got 7",
        ),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"qkv": torch.zeros(2, 5, 3, 1, 8), **changes}
    with pytest.raises(error, match=message):
        ops.attention(arguments.pop("qkv"), **arguments)
