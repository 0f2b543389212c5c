"""Multi-head self-attention over packed qkv as one op; see `fastvit.reference.attention` and
`fastvit.kernels.attention`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import dispatch
from fastvit.dispatch import Op

from . import _common
from ._common import Operator, launchers, statistics_dtype

MAX_HEAD_DIM = 128


def _fake_forward(qkv, scale, key_padding_mask, attn_bias):
    batch, tokens, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(batch, heads, launchers("attention").padded(tokens), dtype=statistics_dtype(qkv))
    return qkv.new_empty(batch, tokens, heads * head_dim), lse


def _backward(dout, qkv, out, lse, scale, key_padding_mask, attn_bias, needs_bias):
    launch = launchers("attention").attention_backward
    dqkv, dbias, _ = launch(dout, qkv, out, lse, scale, key_padding_mask, attn_bias, needs_bias)
    if needs_bias:
        dbias = dbias.sum_to_size(attn_bias.shape)
    return _common.gradients((dqkv, dbias), (qkv, attn_bias))


def _fake_backward(dout, qkv, out, lse, scale, key_padding_mask, attn_bias, needs_bias):
    return _common.fake_gradients(dout, (qkv, attn_bias), (True, needs_bias))


FORWARD = Operator(
    "attention",
    "attention_forward(Tensor qkv, float scale, Tensor? key_padding_mask, Tensor? attn_bias) -> (Tensor, Tensor)",
    _fake_forward,
)
BACKWARD = Operator(
    "attention",
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, float scale, Tensor? key_padding_mask,"
    " Tensor? attn_bias, bool needs_bias) -> (Tensor, Tensor)",
    _fake_backward,
    _backward,
)


class AttentionFunction(torch.autograd.Function):
    """attention on the kernels: (qkv (B, N, 3, H, d), scale, key_padding_mask (B, N) or None, attn_bias or None) ->
    (B, N, H * d)."""

    @staticmethod
    def forward(ctx, qkv, scale, key_padding_mask, attn_bias):
        out, lse = FORWARD.of(qkv, key_padding_mask, attn_bias)(qkv, scale, key_padding_mask, attn_bias)
        ctx.save_for_backward(qkv, out, lse, key_padding_mask, attn_bias)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, out, lse, key_padding_mask, attn_bias = ctx.saved_tensors
        needs_qkv, _, _, needs_bias = ctx.needs_input_grad
        if _common.differentiating_again(dout):

            def attention(qkv, attn_bias):
                return _differentiable(qkv, ctx.scale, key_padding_mask, attn_bias)

            dqkv, dbias = _common.again_differentiable(attention, (qkv, attn_bias), (needs_qkv, needs_bias), dout)
            return dqkv, None, None, dbias
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        given = (qkv, out, lse, ctx.scale, key_padding_mask, attn_bias, needs_bias)
        dqkv, dbias = BACKWARD.of(dout, qkv, key_padding_mask, attn_bias)(dout, *given)
        return dqkv if needs_qkv else None, None, None, dbias if needs_bias else None


def _check(qkv, scale, key_padding_mask, attn_bias, dropout_p):
    name = "attention"
    _common.check_tensors(name, ("attn_bias",), qkv=qkv, attn_bias=attn_bias)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv must have shape (B, N, 3, H, d), got {tuple(qkv.shape)}")
    batch, tokens, _, heads, head_dim = qkv.shape
    if head_dim == 0:
        raise ValueError(f"{name}: qkv must have a head dimension of at least 1, got shape {tuple(qkv.shape)}")
    if scale is not None:
        _common.check_number(name, "scale", scale)
    _common.check_number(name, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")
    check_masks(name, batch, tokens, heads, qkv.device, key_padding_mask, attn_bias)


def check_masks(name: str, batch: int, tokens: int, heads: int, device, key_padding_mask, attn_bias) -> None:
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
        expected = (batch, heads, tokens, tokens)
        sizes = (*[1] * (4 - attn_bias.dim()), *attn_bias.shape)
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, expected, strict=True)):
            raise ValueError(
                f"{name}: attn_bias must broadcast to (B, H, N, N) = {expected}, got {tuple(attn_bias.shape)}"
            )


def _unsupported(qkv, scale, key_padding_mask, attn_bias, dropout_p):
    reasons = [*dispatch.missing_requirements(qkv), *_common.unsupported_dtypes(qkv.dtype)]
    if attn_bias is not None and attn_bias.dtype != qkv.dtype:
        reasons += _common.unsupported_dtypes(attn_bias.dtype)
    if qkv.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head dimension {qkv.shape[-1]}, and the kernels take at most {MAX_HEAD_DIM}")
    if dropout_p > 0:
        reasons.append("dropout_p > 0: the kernels have no dropout")
    return [*reasons, *unsupported_scale(scale)]


def unsupported_scale(scale: float | None) -> list[str]:
    """Why the kernels, which find the largest score before they scale it, do not take this scale."""
    taken = scale is None or scale >= 1e-30
    return [] if taken else [f"scale is {scale}, and the kernels take positive ones only, of 1e-30 at least"]


def _sdpa(qkv, scale, key_padding_mask, attn_bias, dropout_p=0.0):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
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


def _prepare(qkv, scale, key_padding_mask, attn_bias, dropout_p):
    scale = float(qkv.shape[-1] ** -0.5 if scale is None else scale)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    (qkv,) = _common.cast(qkv, qkv)
    return qkv, scale, key_padding_mask, attn_bias


def _pinned(backend: SDPBackend, *args):
    with sdpa_kernel(backend):
        return _sdpa(*args)


_differentiable = partial(_pinned, SDPBackend.MATH)  # the others have no second and no forward-mode derivative


def _torch(*args):
    return _differentiable(*args) if dispatch.transforming() else _sdpa(*args)


_SDPA = {
    f"sdpa {name}": partial(_pinned, backend)
    for name, backend in {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }.items()
}


def _product(qkv, scale, key_padding_mask, attn_bias, dropout_p):
    return _common.compute_dtype(qkv, qkv)


OP = Op("attention", _check, _unsupported, _torch, AttentionFunction, _prepare, _product, _SDPA)


def attention(
    qkv: torch.Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Multi-head self-attention, softmax(q k^T * scale + attn_bias) v (arXiv 1706.03762, 2205.14135).

    qkv (B, N, 3, H, d) of any strides; scale defaults to d ** -0.5; key_padding_mask (B, N) bool, True = attend;
    attn_bias broadcastable to (B, H, N, N), differentiable; dropout_p on the probabilities (in PyTorch, not in the
    kernels). A query that may attend to no key gets zeros. Returns (B, N, H * d) in qkv's dtype. Softmax in float32.
    On the kernels the error in half precision is the same whatever the layout, and at most 1.5 times that of PyTorch's
    fused attention. PyTorch's unfused path, which it takes for some strides, works in float32 inside and is more
    accurate than both. Raises TypeError for a dtype or a scale that is no number, ValueError for a shape, value or
    device that does not fit, before any launch.
    """
    run, args = dispatch.choose(OP, (qkv, scale, key_padding_mask, attn_bias, dropout_p))
    return run(*args)
