"""Multi-head self-attention over packed qkv, of sequences of one length or packed ones of many; see
`fastvit.reference.attention` and `fastvit.kernels.attention`."""

from __future__ import annotations

import numbers
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import dispatch
from fastvit.dispatch import Op
from fastvit.reference.ops import rotate

from . import _common
from ._common import Operator, launchers, statistics_dtype

MAX_HEAD_DIM = 128


def _fake_forward(qkv, scale, *options):
    kernels = launchers("attention")
    out, lse = kernels.result_shapes(qkv, kernels.Options(*options))
    return qkv.new_empty(out), qkv.new_empty(lse, dtype=statistics_dtype(qkv))


def _backward(dout, qkv, out, lse, scale, needs_bias, key_padding_mask, attn_bias, *options):
    launch = launchers("attention").attention_backward
    dqkv, dbias = launch(dout, qkv, out, lse, scale, needs_bias, key_padding_mask, attn_bias, *options)
    if needs_bias:
        dbias = dbias.sum_to_size(attn_bias.shape)
    return _common.gradients((dqkv, dbias), (qkv, attn_bias))


def _fake_backward(dout, qkv, out, lse, scale, needs_bias, key_padding_mask, attn_bias, *options):
    return _common.fake_gradients(dout, (qkv, attn_bias), (True, needs_bias))


# `kernels.attention.Options`.
_OPTIONS = (
    "Tensor? key_padding_mask, Tensor? attn_bias, float dropout_p, Tensor? seed, Tensor? rope_cos, Tensor? rope_sin,"
    " bool rope_interleaved, SymInt? num_queries, Tensor? cu_seqlens, SymInt max_seqlen"
)
FORWARD = Operator(
    "attention", f"attention_forward(Tensor qkv, float scale, {_OPTIONS}) -> (Tensor, Tensor)", _fake_forward
)
BACKWARD = Operator(
    "attention",
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, float scale, bool needs_bias,"
    f" {_OPTIONS}) -> (Tensor, Tensor)",
    _fake_backward,
    _backward,
)


class AttentionFunction(torch.autograd.Function):
    """attention on the kernels: (qkv (B, N, 3, H, d), scale, key_padding_mask (B, N) or None, attn_bias or None) ->
    (B, M, H * d). What follows is optional: dropout_p and its seed, a tensor of one integer; and as `attention` and
    `attention_varlen` take them, rope_cos, rope_sin, rope_interleaved, num_queries, cu_seqlens and max_seqlen."""

    @staticmethod
    def forward(
        ctx,
        qkv,
        scale,
        key_padding_mask,
        attn_bias,
        dropout_p=0.0,
        seed=None,
        rope_cos=None,
        rope_sin=None,
        rope_interleaved=False,
        num_queries=None,
        cu_seqlens=None,
        max_seqlen=0,
    ):
        tensors = (key_padding_mask, attn_bias, seed, rope_cos, rope_sin, cu_seqlens)
        options = _options(tensors, dropout_p, rope_interleaved, num_queries, max_seqlen)
        out, lse = FORWARD.of(qkv, *tensors)(qkv, scale, *options)
        ctx.save_for_backward(qkv, out, lse, *tensors)
        ctx.scale, ctx.numbers = scale, (dropout_p, rope_interleaved, num_queries, max_seqlen)
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, out, lse, *tensors = ctx.saved_tensors
        attn_bias = tensors[1]
        needs = ctx.needs_input_grad[0], attn_bias is not None and ctx.needs_input_grad[3]
        if _common.differentiating_again(dout):
            if tensors[2] is not None:
                raise NotImplementedError(
                    "attention: the kernels' dropout has neither a second derivative nor one of several upstream "
                    "gradients at once; fastvit.use_backend('torch') has"
                )

            def attention(qkv, attn_bias):
                options = _options((tensors[0], attn_bias, *tensors[2:]), *ctx.numbers)
                return _again(qkv, ctx.scale, *options)

            dqkv, dbias = _common.again_differentiable(attention, (qkv, attn_bias), needs, dout)
        else:
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            given = (dout, qkv, out, lse, ctx.scale, needs[1], *_options(tensors, *ctx.numbers))
            dqkv, dbias = _common.or_none(BACKWARD.of(dout, qkv, *tensors)(*given), needs)
        return dqkv, None, None, dbias, *[None] * 8


def _options(tensors, dropout_p, rope_interleaved, num_queries, max_seqlen) -> tuple:
    """All of `_OPTIONS`, in that order; tensors: those that are, in that order."""
    key_padding_mask, attn_bias, seed, rope_cos, rope_sin, cu_seqlens = tensors
    rope = (rope_cos, rope_sin, rope_interleaved)
    return key_padding_mask, attn_bias, dropout_p, seed, *rope, num_queries, cu_seqlens, max_seqlen


def _check(qkv, scale, key_padding_mask, attn_bias, dropout_p, rope_cos, rope_sin, rope_interleaved, num_queries):
    name = "attention"
    _common.check_tensors(name, ("attn_bias", "rope_cos", "rope_sin"), qkv=qkv, attn_bias=attn_bias, **_rope(locals()))
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv must have shape (B, N, 3, H, d), got {tuple(qkv.shape)}")
    batch, tokens, _, heads, head_dim = qkv.shape
    _check_numbers(name, qkv, scale, dropout_p)
    if num_queries is not None:
        if isinstance(num_queries, bool) or not isinstance(num_queries, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name}: num_queries must be an integer or None, got {num_queries!r}")
        if not 0 < num_queries <= tokens:
            raise ValueError(f"{name}: num_queries must be from 1 to N = {tokens}, got {num_queries}")
    check_masks(name, batch, tokens, heads, qkv.device, key_padding_mask, attn_bias, num_queries)
    check_rope(name, rope_cos, rope_sin, rope_interleaved, (batch, tokens, head_dim))


def _rope(arguments: dict) -> dict:
    return {name: arguments[name] for name in ("rope_cos", "rope_sin")}


def _check_numbers(name: str, qkv, scale, dropout_p) -> None:
    if qkv.shape[-1] == 0:
        raise ValueError(f"{name}: qkv must have a head dimension of at least 1, got shape {tuple(qkv.shape)}")
    if scale is not None:
        _common.check_number(name, "scale", scale)
    _common.check_number(name, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")


def check_rope(name: str, cos, sin, interleaved, sizes: tuple[int, int, int], tokens_letter: str = "N") -> None:
    """Raise ValueError, or TypeError for an `interleaved` that is no bool, unless the tables are of tokens and pairs of
    columns of q of these sizes (B, N, d)."""
    if not isinstance(interleaved, bool):
        raise TypeError(f"{name}: rope_interleaved must be True or False, got {interleaved!r}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{name}: rope_cos and rope_sin must come together, got only one of them")
    if cos is None:
        return
    batch, tokens, head_dim = sizes
    if head_dim % 2:
        raise ValueError(f"{name}: a rotary embedding needs an even head dimension, got {head_dim}")
    known = cos.dim() == 2 or (cos.dim() == 3 and cos.shape[0] in (1, batch))
    if not known or cos.shape[-1] != head_dim // 2 or cos.shape[-2] > tokens:
        raise ValueError(
            f"{name}: rope_cos must have shape (R, d / 2) or (B, R, d / 2) with R at most {tokens_letter} = {tokens}, "
            f"B = {batch} and d / 2 = {head_dim // 2}, got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"{name}: rope_sin must have rope_cos's shape and dtype, {tuple(cos.shape)} and {cos.dtype}, got "
            f"{tuple(sin.shape)} and {sin.dtype}"
        )


def check_masks(
    name: str, batch: int, tokens: int, heads: int, device, key_padding_mask, attn_bias, num_queries: int | None = None
) -> None:
    """Raise TypeError or ValueError unless the masks fit attention of these sizes on `device`."""
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, torch.Tensor):
            raise TypeError(f"{name}: key_padding_mask must be a torch.Tensor, got {type(key_padding_mask).__name__}")
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"{name}: key_padding_mask must be bool (True = attend), got {key_padding_mask.dtype}")
        _common.check_shape(name, "key_padding_mask", key_padding_mask, (batch, tokens), "(B, N)")
        if key_padding_mask.device != device:
            raise ValueError(f"{name}: key_padding_mask is on {key_padding_mask.device}, but the rest is on {device}")
    if attn_bias is not None:
        expected = (batch, heads, tokens if num_queries is None else num_queries, tokens)
        letters = "(B, H, N, N)" if num_queries is None else "(B, H, M, N)"
        sizes = (*[1] * (4 - attn_bias.dim()), *attn_bias.shape)
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, expected, strict=True)):
            raise ValueError(
                f"{name}: attn_bias must broadcast to {letters} = {expected}, got {tuple(attn_bias.shape)}"
            )


def _unsupported(qkv, scale, key_padding_mask, attn_bias, dropout_p, rope_cos, rope_sin, rope_interleaved, num_queries):
    reasons = [*dispatch.missing_requirements(qkv), *_common.unsupported_dtypes(qkv.dtype)]
    if attn_bias is not None and attn_bias.dtype != qkv.dtype:
        reasons += _common.unsupported_dtypes(attn_bias.dtype)
    if qkv.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head dimension {qkv.shape[-1]}, and the kernels take at most {MAX_HEAD_DIM}")
    return [*reasons, *unsupported_rope(rope_cos, rope_sin, qkv.dtype), *unsupported_scale(scale)]


def unsupported_rope(rope_cos, rope_sin, dtype: torch.dtype) -> list[str]:
    """Why the kernels do not take these tables beside q and k in `dtype`."""
    reasons = [] if rope_cos is None or rope_cos.dtype == dtype else _common.unsupported_dtypes(rope_cos.dtype)
    if dispatch.needs_grad(rope_cos, rope_sin):
        reasons.append("the rotary embedding requires a gradient, and the kernels make none for it")
    return reasons


def unsupported_scale(scale: float | None) -> list[str]:
    """Why the kernels, which find the largest score before they scale it, do not take this scale."""
    taken = scale is None or scale >= 1e-30
    return [] if taken else [f"scale is {scale}, and the kernels take positive ones only, of 1e-30 at least"]


def _sdpa(
    qkv,
    scale,
    key_padding_mask=None,
    attn_bias=None,
    dropout_p=0.0,
    rope_cos=None,
    rope_sin=None,
    rope_interleaved=False,
    num_queries=None,
):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if rope_cos is not None:
        q, k = (rotate(x, rope_cos, rope_sin, rope_interleaved) for x in (q, k))
    if num_queries is not None:
        q = q[:, :, :num_queries]
    mask = None
    if attn_bias is not None:
        mask = attn_bias.to(qkv.dtype).reshape((*[1] * (4 - attn_bias.dim()), *attn_bias.shape))
    if key_padding_mask is not None:
        allowed = key_padding_mask[:, None, None, :]
        mask = allowed if mask is None else mask.masked_fill(~allowed, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    if mask is not None:
        # Back ends of SDPA differ on a query that may attend to no key: NaN or 0. It is 0 here.
        alive = (mask if mask.dtype == torch.bool else mask != float("-inf")).any(dim=-1, keepdim=True)
        out = torch.where(alive, out, 0)
    return out.transpose(1, 2).flatten(2)


def _sdpa_varlen(qkv, cu_seqlens, max_seqlen, scale, dropout_p, rope_cos, rope_sin, rope_interleaved):
    bounds = cu_seqlens.tolist()
    outs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        rope = [None if angle is None else angle[begin:end] for angle in (rope_cos, rope_sin)]
        outs.append(_sdpa(qkv[None, begin:end], scale, None, None, dropout_p, *rope, rope_interleaved)[0])
    out = torch.cat(outs) if outs else qkv[:0, 0].flatten(1)
    return F.pad(out, (0, 0, 0, qkv.shape[0] - out.shape[0]))  # as on the kernels, tokens of no sequence get zeros


def _prepare(qkv, scale, key_padding_mask, attn_bias, dropout_p, rope_cos, rope_sin, rope_interleaved, num_queries):
    scale = float(qkv.shape[-1] ** -0.5 if scale is None else scale)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    (qkv,) = _common.cast(qkv, qkv)
    seed = torch.randint(1 << 62, (1,), device=qkv.device) if dropout_p > 0 else None
    options = (float(dropout_p), seed, *alike_strides(rope_cos, rope_sin), rope_interleaved, num_queries)
    return qkv, scale, key_padding_mask, attn_bias, *options


def alike_strides(rope_cos, rope_sin) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The tables as the kernels read them: of the same strides."""
    if rope_cos is None or rope_cos.stride() == rope_sin.stride():
        return rope_cos, rope_sin
    return rope_cos.contiguous(), rope_sin.contiguous()


def _pinned(backend: SDPBackend, function, *args):
    with sdpa_kernel(backend):
        return function(*args)


def _differentiable(function, *args):
    return _pinned(SDPBackend.MATH, function, *args)  # the others have no second and no forward-mode derivative


def _again(
    qkv, scale, key_padding_mask, attn_bias, dropout_p, seed, cos, sin, interleaved, queries, cu_seqlens, longest
):
    """The kernels' attention, without dropout, in PyTorch."""
    if cu_seqlens is not None:
        return _differentiable(_sdpa_varlen, qkv, cu_seqlens, longest, scale, 0.0, cos, sin, interleaved)
    return _differentiable(_sdpa, qkv, scale, key_padding_mask, attn_bias, 0.0, cos, sin, interleaved, queries)


def _in_torch(function, *args):
    return _differentiable(function, *args) if dispatch.transforming() else function(*args)


_BACKENDS = {
    f"sdpa {name}": backend
    for name, backend in {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }.items()
}


def _product(qkv, *others):
    return _common.compute_dtype(qkv, qkv)


OP = Op(
    "attention",
    _check,
    _unsupported,
    partial(_in_torch, _sdpa),
    AttentionFunction,
    _prepare,
    _product,
    {name: partial(_pinned, backend, _sdpa) for name, backend in _BACKENDS.items()},
)


def attention(
    qkv: torch.Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_interleaved: bool = False,
    num_queries: int | None = None,
) -> torch.Tensor:
    """Multi-head self-attention, softmax(q k^T * scale + attn_bias) v (arXiv 1706.03762, 2205.14135).

    qkv (B, N, 3, H, d) of any strides; scale defaults to d ** -0.5; key_padding_mask (B, N) bool, True = attend;
    attn_bias broadcastable to (B, H, M, N), differentiable; dropout_p on the probabilities, of which the kernels have
    no second derivative. num_queries: M, only the first so many tokens ask (1: the class token of a last block); None:
    all N. A query that may attend to no key gets zeros. Returns (B, M, H * d) in qkv's dtype. Softmax in float32.

    rope_cos, rope_sin (R, d / 2) or (B, R, d / 2): a rotary position embedding (arXiv 2104.09864) of the last R tokens,
    those after class and register tokens, applied to q and k: each pair of columns (a, b) becomes
    (a cos - b sin, b cos + a sin), rounded to qkv's dtype; the kernels compute it in float32. b is d / 2 columns after
    a (DINOv3), or the next one with rope_interleaved (EVA-02). Where the tables require a gradient, PyTorch runs the
    op.

    On the kernels the error in half precision is the same whatever the layout, and at most 1.5 times that of PyTorch's
    fused attention. PyTorch's unfused path, which it takes for some strides, works in float32 inside and is more
    accurate than both. Raises TypeError for a dtype or a scale that is no number, ValueError for a shape, value or
    device that does not fit, before any launch.
    """
    rope = (rope_cos, rope_sin, rope_interleaved)
    run, args = dispatch.choose(OP, (qkv, scale, key_padding_mask, attn_bias, dropout_p, *rope, num_queries))
    return run(*args)


def _check_varlen(qkv, cu_seqlens, max_seqlen, scale, dropout_p, rope_cos, rope_sin, rope_interleaved):
    name = "attention_varlen"
    _common.check_tensors(name, ("rope_cos", "rope_sin"), qkv=qkv, **_rope(locals()))
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{name}: qkv must have shape (T, 3, H, d), got {tuple(qkv.shape)}")
    tokens, _, _, head_dim = qkv.shape
    _check_numbers(name, qkv, scale, dropout_p)
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name}: cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"{name}: cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"{name}: cu_seqlens is on {cu_seqlens.device}, but qkv is on {qkv.device}")
    if max_seqlen is None and torch.compiler.is_compiling():
        raise ValueError(f"{name}: max_seqlen must be given to a compiler, which cannot look at cu_seqlens")
    if max_seqlen is not None:
        if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name}: max_seqlen must be an integer or None, got {max_seqlen!r}")
        if max_seqlen < 1:
            raise ValueError(f"{name}: max_seqlen must be at least 1, got {max_seqlen}")
    check_rope(name, rope_cos, rope_sin, rope_interleaved, (1, tokens, head_dim), "T")
    if rope_cos is not None and rope_cos.shape != (tokens, head_dim // 2):
        raise ValueError(
            f"{name}: rope_cos must have shape (T, d / 2) = {(tokens, head_dim // 2)}, got {tuple(rope_cos.shape)}"
        )


def _check_bounds(cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int | None) -> None:
    """Raise ValueError unless cu_seqlens divides `tokens` into sequences of at most max_seqlen."""
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"attention_varlen: cu_seqlens must rise from 0 to T = {tokens}, got {bounds}")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"attention_varlen: max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} tokens")


def _readable(tensor: torch.Tensor) -> bool:
    """Whether the numbers are there to be looked at without waiting for a device."""
    tracing = torch.compiler.is_compiling() or dispatch.transforming() or torch._C._len_torch_dispatch_stack()
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not tracing


def _unsupported_varlen(qkv, cu_seqlens, max_seqlen, scale, dropout_p, *rope):
    return _unsupported(qkv, scale, None, None, dropout_p, *rope, None)


def _prepare_varlen(qkv, cu_seqlens, max_seqlen, scale, dropout_p, *rope):
    *given, _ = _prepare(qkv, scale, None, None, dropout_p, *rope, None)
    if max_seqlen is None:
        max_seqlen = max(1, int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0)
    return *given, None, cu_seqlens.contiguous(), max_seqlen


VARLEN_OP = Op(
    "attention_varlen",
    _check_varlen,
    _unsupported_varlen,
    partial(_in_torch, _sdpa_varlen),
    AttentionFunction,
    _prepare_varlen,
    _product,
)


def attention_varlen(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_interleaved: bool = False,
) -> torch.Tensor:
    """`attention` of packed sequences of different lengths, each by itself, without padding (NaViT, arXiv 2307.06304).

    qkv (T, 3, H, d) of any strides, the tokens of all sequences one after the other; cu_seqlens (S + 1,) int32 or
    int64, on qkv's device, from 0 to T: sequence i is of tokens cu_seqlens[i] to cu_seqlens[i + 1], and may be empty;
    max_seqlen: the most tokens of a sequence, or more; None: it is looked up, for which a GPU has to be waited for.
    scale, dropout_p, rope_interleaved: see `attention`; rope_cos, rope_sin (T, d / 2), for prefix tokens 1 and 0.
    Returns (T, H * d) in qkv's dtype. What a sequence gets does not depend on those beside it, to the bit, for the same
    max_seqlen.

    Raises what `attention` does. Whether the numbers in cu_seqlens fit is looked at on the CPU only, and not under a
    compiler or a transform: elsewhere what is beyond max_seqlen, or in no sequence, gets zeros. PyTorch's back end
    always waits for cu_seqlens.
    """
    given = (qkv, cu_seqlens, max_seqlen, scale, dropout_p, rope_cos, rope_sin, rope_interleaved)
    run, args = dispatch.choose(VARLEN_OP, given)
    if _readable(cu_seqlens):
        _check_bounds(cu_seqlens, qkv.shape[0], max_seqlen)
    return run(*args)
