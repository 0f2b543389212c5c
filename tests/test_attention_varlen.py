"""attention_varlen: packed sequences against each one alone, with every option; lengths, bad input."""

import sys

import pytest
import torch

import fastvit
from fastvit import ops, reference
from fastvit.accuracy import limit, relative_rms, rounding
from fastvit.examples import ROPE

pytestmark = pytest.mark.usefixtures("triton_backend")

module = sys.modules["fastvit.ops.attention"]  # whose name in `fastvit.ops` is the op's
LENGTHS = (17, 0, 1, 70, 2, 64, 65)


def bounds(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=dtype)


def packed(lengths, head_dim, dtype, device, heads=2):
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, device=device).to(dtype)
    angles = 6 * torch.rand(sum(lengths), head_dim // 2, device=device)
    return qkv, {"rope_cos": angles.cos(), "rope_sin": angles.sin()}


def run(function, qkv, upstream, *args, **kwargs):
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, *args, **kwargs)
    return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out))[0]


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_against_the_formula(head_dim, dtype, rotary, device):
    qkv, rope = packed(LENGTHS, head_dim, dtype, device)
    given = {"scale": 0.2, **(rope if rotary else {}), "rope_interleaved": rotary}
    cu_seqlens = bounds(LENGTHS, device)
    upstream = torch.randn(qkv.shape[0], 2 * head_dim, device=device).to(dtype)
    truth = run(reference.attention_varlen, qkv.double(), upstream, cu_seqlens, **given)
    with fastvit.use_backend("torch"):
        plain = run(ops.attention_varlen, qkv, upstream, cu_seqlens, **given)
    ours = run(ops.attention_varlen, qkv, upstream, cu_seqlens, **given)
    for t, p, o in zip(truth, plain, ours, strict=True):
        assert relative_rms(o, t) <= limit(dtype, relative_rms(p, t), rounding(dtype))


def test_neighbours_do_not_count(device):
    """To the bit what each sequence gets alone, though one beside it is poisoned."""
    qkv, rope = packed(LENGTHS, 32, torch.bfloat16, device)
    upstream = torch.randn(qkv.shape[0], 64, device=device)
    cu_seqlens = bounds(LENGTHS, device)
    out, grad = run(ops.attention_varlen, qkv, upstream, cu_seqlens, max_seqlen=70, **rope)
    for number, length in enumerate(LENGTHS):
        part = slice(sum(LENGTHS[:number]), sum(LENGTHS[: number + 1]))
        tables = {name: table[part] for name, table in rope.items()}
        alone = (ops.attention_varlen, qkv[part], upstream[part], bounds([length], device))
        for got, want in zip(run(*alone, max_seqlen=70, **tables), (out[part], grad[part]), strict=True):
            assert torch.equal(got, want), length
        if length > 2:
            poisoned = qkv.clone()
            poisoned[part] = float("nan")
            again = run(ops.attention_varlen, poisoned, upstream, cu_seqlens, max_seqlen=70, **rope)
            for got, want in zip(again, (out, grad), strict=True):
                assert torch.equal(got[: part.start], want[: part.start])
                assert torch.equal(got[part.stop :], want[part.stop :])


def test_strides_and_a_longest_sequence_that_is_not_said(device):
    qkv, _ = packed(LENGTHS, 16, torch.float32, device)
    upstream = torch.randn(32, device=device)
    cu_seqlens = bounds(LENGTHS, device)
    expected = run(ops.attention_varlen, qkv, upstream.expand(qkv.shape[0], 32), cu_seqlens, max_seqlen=70)
    strided = torch.empty(2 * qkv.shape[0], 3, 2, 32, device=device)[::2, :, :, ::2].copy_(qkv)
    wide = bounds(LENGTHS, device, torch.int64)
    got = run(ops.attention_varlen, strided, upstream.expand(qkv.shape[0], 32), wide)
    for ours, want in zip(got, expected, strict=True):
        assert relative_rms(ours, want) < 1e-6
    longer = run(ops.attention_varlen, qkv, upstream.expand(qkv.shape[0], 32), cu_seqlens, max_seqlen=300)
    for ours, want in zip(longer, expected, strict=True):
        assert relative_rms(ours, want) < 1e-6


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (3,), (1, 1)], ids=str)
def test_no_sequence_and_few(lengths, device):
    for backend in ("triton", "torch"):
        with fastvit.use_backend(backend):
            qkv = torch.randn(sum(lengths), 3, 2, 16, device=device, requires_grad=True)
            out = ops.attention_varlen(qkv, bounds(lengths, device))
            assert out.shape == (sum(lengths), 32)
            assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
        if all(length == 1 for length in lengths):
            assert torch.equal(out, qkv[:, 2].flatten(1))


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "taken"),
    [([0, 5], 5, [5]), ([0, 9], 4, [4]), ([2, 5, 30], 20, None), ([0, -3, 10], 20, None), ([-4, 6], 20, None)],
    ids=str,
)
def test_what_nobody_looked_at_touches_no_other_memory(cu_seqlens, max_seqlen, taken, device, monkeypatch):
    """As on a GPU, where the numbers are not read: tokens in no sequence, or beyond the longest, get zeros."""
    monkeypatch.setattr(module, "_readable", lambda tensor: False)
    qkv = torch.randn(12, 3, 2, 16, device=device)
    bound = torch.tensor(cu_seqlens, device=device)
    out, grad = run(ops.attention_varlen, qkv, torch.ones(12, 32), bound, max_seqlen=max_seqlen)
    assert out.isfinite().all() and grad.isfinite().all()
    if taken is not None:
        assert not out[taken[0] :].any() and not grad[cu_seqlens[1] :].any()
        alone = qkv[: taken[0], None].transpose(0, 1)
        if cu_seqlens[1] == taken[0]:
            assert relative_rms(out[: taken[0]], reference.attention(alone)[0]) < 1e-6


def test_autocast_gives_the_same_dtype_on_both_back_ends(device):
    qkv = torch.randn(9, 3, 2, 16, device=device)
    for backend in ("triton", "torch"):
        with fastvit.use_backend(backend), torch.autocast(device, torch.bfloat16):
            assert ops.attention_varlen(qkv, bounds((4, 5), device)).dtype == torch.bfloat16


def test_dropout_is_every_sequences_own(device):
    """With equal scores and unit vectors for values, a row is its dropout's factors."""
    lengths, rate = (40, 40, 30), 0.4
    qkv = torch.zeros(110, 3, 2, 64, device=device)
    for number in range(3):
        begin = sum(lengths[:number])
        qkv[begin : begin + lengths[number], 2] = torch.eye(lengths[number], 64, device=device)[:, None]
    torch.manual_seed(0)
    out = ops.attention_varlen(qkv.requires_grad_(), bounds(lengths, device), dropout_p=rate)
    keep = out.detach().view(110, 2, 64).split(lengths)
    keep = [part[..., :length] != 0 for part, length in zip(keep, lengths, strict=True)]
    for part in keep:
        assert abs(part.double().mean() - (1 - rate)) < 4 * (rate * (1 - rate) / part.numel()) ** 0.5
    assert (keep[0] == keep[1]).double().mean() < 0.6  # by chance, 0.52 are the same
    grad = torch.autograd.grad(out.sum(), qkv)[0][:40, 2].sum(-1)  # of a value: how often it was kept
    torch.testing.assert_close(grad, 64 * keep[0].sum(0).T / (1 - rate) / 40)


def test_differentiated_twice_it_is_torchs(device):
    qkv, rope = packed((2, 3), 2, torch.float64, device, heads=1)
    cu_seqlens = bounds((2, 3), device)
    torch.autograd.gradgradcheck(
        lambda x: ops.attention_varlen(x, cu_seqlens, **rope), qkv.requires_grad_(), atol=1e-4, rtol=1e-3
    )


def test_gradients_by_differences(device):
    if device != "cpu":
        pytest.skip("the kernels take float64 in the interpreter only")
    qkv, rope = packed((2, 0, 3), 2, torch.float64, device, heads=1)
    rope = {name: table.double() for name, table in rope.items()}
    cu_seqlens = bounds((2, 0, 3), device)
    torch.autograd.gradcheck(lambda x: ops.attention_varlen(x, cu_seqlens, **rope), qkv.requires_grad_())


def test_a_compiler_has_to_be_told_the_longest(device):
    qkv, cu_seqlens = torch.randn(8, 3, 2, 16, device=device), bounds((5, 3), device)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(qkv, max_seqlen=None):
        return ops.attention_varlen(qkv, cu_seqlens, max_seqlen=max_seqlen)

    torch.testing.assert_close(compiled(qkv, 5), reference.attention_varlen(qkv, cu_seqlens))
    with pytest.raises(Exception, match="max_seqlen must be given to a compiler"):
        compiled(qkv)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": torch.zeros(5, 2, 1, 8)}, ValueError, r"qkv must have shape \(T, 3, H, d\), got \(5, 2, 1, 8\)"),
        ({"qkv": torch.zeros(1, 5, 3, 1, 8)}, ValueError, r"qkv must have shape \(T, 3, H, d\)"),
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"cu_seqlens must have shape \(S \+ 1,\), got \(1, 2\)"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, r"shape \(S \+ 1,\), got \(0,\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"must rise from 0 to T = 5, got \[0, 4\]"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, r"must rise from 0 to T = 5, got \[1, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, ValueError, r"must rise from 0 to T = 5"),
        ({"max_seqlen": 2}, ValueError, "max_seqlen is 2, but a sequence has 3 tokens"),
        ({"max_seqlen": 0}, ValueError, "max_seqlen must be at least 1, got 0"),
        ({"max_seqlen": 2.5}, TypeError, "max_seqlen must be an integer or None, got 2.5"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict.fromkeys(ROPE, torch.zeros(4, 4)), ValueError, r"rope_cos must have shape \(T, d / 2\) = \(5, 4\)"),
        (dict.fromkeys(ROPE, torch.zeros(1, 5, 4)), ValueError, r"rope_cos must have shape \(T, d / 2\) = \(5, 4\)"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"qkv": torch.zeros(5, 3, 1, 8), "cu_seqlens": torch.tensor([0, 3, 5]), **changes}
    for backend in ("triton", "torch"):
        with fastvit.use_backend(backend), pytest.raises(error, match=message):
            ops.attention_varlen(**arguments)
    good = {"qkv": torch.zeros(5, 3, 1, 8), "cu_seqlens": torch.tensor([0, 3, 5])}
    assert ops.attention_varlen(**good).shape == (5, 8)
    if "cu_seqlens" in changes and isinstance(changes["cu_seqlens"], torch.Tensor):  # also where a call alike was made
        with pytest.raises(error, match=message):
            ops.attention_varlen(**arguments)
