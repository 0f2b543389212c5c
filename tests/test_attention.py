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
from fastvit.interpret import sanitizer

pytestmark = pytest.mark.usefixtures("triton_backend")


def run(function, qkv, upstream, **kwargs):
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, **kwargs)
    return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out))[0]


def assert_matches(qkv, **kwargs):
    """Output and gradient against float64; the bar is plain PyTorch in the same dtype."""
    dtype = qkv.dtype
    shape = (*qkv.shape[:2], qkv.shape[3] * qkv.shape[4])
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
            given, (out, lse) = kernels.forward(qkv, head_dim**-0.5)
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
            given, (out, lse) = kernels.forward(qkv, 0.25, key_padding_mask, attn_bias)
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
    given, (out, lse) = kernels.forward(torch.randn(1, tokens, 3, 2, 64, device=device).bfloat16(), 0.125)
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
    explanation = fastvit.explain("attention", wide, dropout_p=0.5)
    assert explanation.backend == "torch"
    assert [reason for reason in explanation.reasons if "160" in reason]
    assert [reason for reason in explanation.reasons if "dropout" in reason]
    with pytest.raises(RuntimeError, match="head dimension 160.*dropout"):
        ops.attention(wide, dropout_p=0.5)
    with fastvit.use_backend("auto"):
        assert relative_rms(ops.attention(wide), reference.attention(wide)) < 1e-6
        dropped = ops.attention(torch.ones(1, 64, 3, 1, 16, device=device), dropout_p=0.5)
        assert dropped.std() > 0.01  # all values are ones: only dropout makes the outputs differ


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
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"qkv": torch.zeros(2, 5, 3, 1, 8), **changes}
    with pytest.raises(error, match=message):
        ops.attention(arguments.pop("qkv"), **arguments)
