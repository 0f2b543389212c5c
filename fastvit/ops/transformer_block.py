"""A whole pre-norm transformer block as one op; see `fastvit.reference.transformer_block` and
`fastvit.kernels.transformer_block`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from fastvit import dispatch, reference
from fastvit.dispatch import Op
from fastvit.reference.ops import gate, is_gated

from . import _common
from ._common import Operator, dense, or_none, statistics_dtype
from .attention import (
    MAX_HEAD_DIM,
    alike_strides,
    attention,
    check_masks,
    check_rope,
    unsupported_rope,
    unsupported_scale,
)
from .layer_norm import check_norm, unsupported_norm
from .layer_norm_linear import layer_norm_linear
from .layer_norm_mlp import ACTIVATIONS, layer_norm_mlp
from .linear_residual import linear_residual

LAYERS = 12  # tensors that the forward operator makes of the four layers


class Carry:
    """What one block knows of its output and the next one needs. Of the calls that are handed it one after the other,
    each takes it where its x is the last one's output, as it was returned, and leaves its own."""

    __slots__ = ("stream", "version", "x")

    def __init__(self):
        self.leave(None, (None, None, None))

    def leave(self, x: torch.Tensor | None, stream: tuple[torch.Tensor | None, ...]) -> None:
        """What the next call may take for x."""
        self.x, self.version, self.stream = x, _version(x), stream

    def take(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """What was left for x, if it was for products in `dtype`, else None thrice."""
        copy = self.stream[0]
        fits = dtype == (x.dtype if copy is None else copy.dtype)
        same = self.x is x and self.version == _version(x)
        stream = self.stream if same and fits else (None, None, None)
        self.leave(None, (None, None, None))
        return stream


def _version(x: torch.Tensor | None) -> int | None:
    """How often x was changed in place; of an inference tensor nobody counts it."""
    return None if x is None or x.is_inference() else x._version


def _fake_forward(x, copy, centre, stats, *others):
    *parameters, scale1, scale2, _, _ = others[:16]
    num_heads, _, _, _, _, recompute_fc1, keep, dtype = others[21:]
    batch, tokens, dim = x.shape
    rows, acc = batch * tokens, statistics_dtype(x)
    hidden = parameters[8].shape[0]

    def made(*shape, dtype=dtype):
        return x.new_empty(shape, dtype=dtype)

    def none():
        return x.new_empty(0)

    wide = _common.launchers("transformer_block").reads_copy(x.dtype, dtype)
    stream = (made(rows, dim) if wide else none(), made(rows, dtype=acc) if wide else none())
    groups = _common.launchers("transformer_block").groups_of(dim)
    out = (torch.empty_like(x), *stream, made(2, groups, rows, dtype=acc))
    if not keep:
        return *out, *[none() for _ in range(23)]
    statistics = [made(rows, dtype=acc) for _ in range(4)]
    saved = (
        *(made(rows, dim) if wide and stats is None else none(), *statistics[:2]),
        made(batch, tokens, 3, num_heads, dim // num_heads),
        made(batch, tokens, dim),
        made(batch, num_heads, _common.launchers("attention").padded(tokens), dtype=acc),
        *(made(rows, dim), *statistics[2:]),
        *((none(), made(2, groups, rows, dtype=acc)) if recompute_fc1 else (made(rows, hidden), none())),
    )
    layers = []
    for weight, bias, normed, scale in (
        (parameters[2], None, True, None),
        (parameters[4], parameters[5], False, scale1),
        (parameters[8], None, True, None),
        (parameters[10], parameters[11], False, scale2),
    ):
        folded = normed or scale is not None or weight.dtype != dtype
        vector = made(weight.shape[0], dtype=acc)
        layers.append(made(*weight.shape) if folded else none())
        layers.append(vector if normed or (bias is not None and scale is not None) else none())
        layers.append(torch.empty_like(vector) if normed else none())
    return *out, *saved, *layers


def _backward(dout, read, *others):
    launch = _common.launchers("transformer_block").transformer_block_backward
    parameters, attn_bias = others[22:36], others[39]
    *grads, dbias = _common.or_none(launch(dout, read, *others), others[-1])
    if dbias is not None:
        dbias = dbias.sum_to_size(attn_bias.shape)
    return _common.gradients((*grads, dbias), (dout, *parameters, attn_bias))


def _fake_backward(dout, read, *others):
    return _common.fake_gradients(dout, (dout, *others[22:36], others[39]), others[-1])


_PARAMETERS = (
    "Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight,"
    " Tensor? proj_bias, Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor? fc1_bias,"
    " Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale1, Tensor? layer_scale2, Tensor? drop_path_scale1,"
    " Tensor? drop_path_scale2, Tensor? key_padding_mask, Tensor? attn_bias, Tensor? rope_cos, Tensor? rope_sin,"
    " bool rope_interleaved"
)
_SAVED = (
    "Tensor mean1, Tensor rstd1, Tensor qkv, Tensor out, Tensor lse, Tensor x1, Tensor mean2, Tensor rstd2,"
    " Tensor? preactivation, Tensor? stats2"
)
_MADE = ", ".join(f"Tensor? made{number}" for number in range(LAYERS))
FORWARD = Operator(
    "transformer_block",
    f"transformer_block_forward(Tensor x, Tensor? copy, Tensor? centre, Tensor? stats, {_PARAMETERS}, int num_heads,"
    " float scale, float eps1, float eps2, str activation, bool recompute_fc1, bool keep, ScalarType dtype)"
    f" -> ({', '.join(['Tensor'] * 27)})",
    _fake_forward,
)
BACKWARD = Operator(
    "transformer_block",
    f"transformer_block_backward(Tensor dout, Tensor read, {_SAVED}, {_MADE}, {_PARAMETERS}, float scale, float eps2,"
    f" str activation, bool[] needs) -> ({', '.join(['Tensor'] * 16)})",
    _fake_backward,
    _backward,
)


class TransformerBlockFunction(torch.autograd.Function):
    """transformer_block on the kernels: (x (B, N, D), the twelve parameters, layer_scale1, layer_scale2,
    drop_path_scale1, drop_path_scale2, key_padding_mask, attn_bias, rope_cos, rope_sin, rope_interleaved, num_heads,
    scale, eps1, eps2, activation, recompute_fc1, keep, dtype, carry) -> (B, N, D). keep: a backward pass may come;
    dtype: of the products; carry: a Carry or None."""

    @staticmethod
    def forward(ctx, x, *others):
        *given, interleaved, num_heads, scale, eps1, eps2, activation, recompute_fc1, keep, dtype, carry = others
        stream = (None, None, None) if carry is None else carry.take(x, dtype)
        how = (num_heads, scale, eps1, eps2, activation)
        out, *found = FORWARD.of(x, *given)(x, *stream, *given, interleaved, *how, recompute_fc1, keep, dtype)
        if carry is not None:
            carry.stream = tuple([value if value is not None and value.numel() else None for value in found[:3]])
        if keep:
            read, *saved = found[3:]
            if stream[0] is not None:
                read = stream[0]
            elif read is None or not read.numel():
                read = x.flatten(0, 1)
            made = [value if value is not None and value.numel() else None for value in saved[8:]]
            ctx.save_for_backward(x, read, *saved[:8], *made, *given)
        ctx.how = (interleaved, *how)
        return _common.shaped(out, *x.shape)

    @staticmethod
    def backward(ctx, dout):
        x, *saved = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:15], ctx.needs_input_grad[18])
        interleaved, num_heads, scale, eps1, eps2, activation = ctx.how
        given = saved[23:]
        if _common.differentiating_again(dout):
            *parameters, scale1, scale2, drop1, drop2, key_padding_mask, attn_bias = given[:18]

            def block(x, *inputs):
                *parameters, scale1, scale2, attn_bias = inputs
                others = (scale1, scale2, drop1, drop2, key_padding_mask, attn_bias, *given[18:], interleaved, False)
                return _reference(x, *parameters, num_heads, scale, eps1, eps2, activation, *others)

            grads = _common.again_differentiable(block, (x, *parameters, scale1, scale2, attn_bias), needs, dout)
        else:
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            grads = or_none(BACKWARD.of(dout, *saved)(dout, *saved, interleaved, scale, eps2, activation, needs), needs)
        return *grads[:15], None, None, None, grads[15], *[None] * 12


def _check(
    x,
    norm1_weight,
    norm1_bias,
    qkv_weight,
    qkv_bias,
    proj_weight,
    proj_bias,
    norm2_weight,
    norm2_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    num_heads,
    scale,
    eps1,
    eps2,
    activation,
    layer_scale1,
    layer_scale2,
    drop_path_scale1,
    drop_path_scale2,
    key_padding_mask,
    attn_bias,
    rope_cos,
    rope_sin,
    rope_interleaved,
    recompute_fc1,
):
    name = "transformer_block"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    weights = dict(
        norm1_weight=norm1_weight,
        norm1_bias=norm1_bias,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        proj_weight=proj_weight,
        proj_bias=proj_bias,
        norm2_weight=norm2_weight,
        norm2_bias=norm2_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
    )
    others = dict(
        layer_scale1=layer_scale1,
        layer_scale2=layer_scale2,
        drop_path_scale1=drop_path_scale1,
        drop_path_scale2=drop_path_scale2,
        attn_bias=attn_bias,
        rope_cos=rope_cos,
        rope_sin=rope_sin,
    )
    optional = ("qkv_bias", "proj_bias", "fc1_bias", "fc2_bias", *others)
    _common.check_tensors(name, optional, x=x, **weights, **others)
    if x.dim() != 3:
        raise ValueError(f"{name}: x must have shape (B, N, D), got {tuple(x.shape)}")
    dim = x.shape[2]
    check_norm(name, x, norm1_weight, norm1_bias, eps1)
    check_norm(name, x, norm2_weight, norm2_bias, eps2)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
        raise ValueError(f"{name}: num_heads must be a positive divisor of D = {dim}, got {num_heads!r}")
    if scale is not None:
        _common.check_number(name, "scale", scale)
    _common.check_shape(name, "qkv_weight", qkv_weight, (3 * dim, dim), "(3 D, D)")
    _common.check_shape(name, "qkv_bias", qkv_bias, (3 * dim,), "(3 D,)")
    _common.check_shape(name, "proj_weight", proj_weight, (dim, dim), "(D, D)")
    _common.check_shape(name, "proj_bias", proj_bias, (dim,), "(D,)")
    _common.check_matrix(name, "fc1_weight", fc1_weight, "(M, D)", inputs=dim)
    outputs = fc1_weight.shape[0]
    _common.check_shape(name, "fc1_bias", fc1_bias, (outputs,), "(M,)")
    gated = fc2_weight.dim() == 2 and is_gated(fc1_weight, fc2_weight)
    inputs, shape = (outputs // 2, "(D, M / 2)") if gated else (outputs, "(D, M), or gated (D, M / 2)")
    _common.check_shape(name, "fc2_weight", fc2_weight, (dim, inputs), shape)
    _common.check_shape(name, "fc2_bias", fc2_bias, (dim,), "(D,)")
    _common.check_scales(name, x, dim, layer_scale1, drop_path_scale1)
    _common.check_scales(name, x, dim, layer_scale2, drop_path_scale2)
    linear = {key: value for key, value in weights.items() if not key.startswith("norm")}
    _common.check_operands(name, x, **linear)
    check_masks(name, *x.shape[:2], num_heads, x.device, key_padding_mask, attn_bias)
    check_rope(name, rope_cos, rope_sin, rope_interleaved, (*x.shape[:2], dim // num_heads))


def _unsupported(x, *others):
    parameters, num_heads, attn_bias, rope_cos, rope_sin = others[:12], others[12], *others[22:25]
    dtypes = [x.dtype, parameters[0].dtype, parameters[6].dtype, _common.compute_dtype(x, parameters[2])]
    if attn_bias is not None:
        dtypes.append(attn_bias.dtype)
    reasons = [*dispatch.missing_requirements(x), *_common.unsupported_dtypes(*dtypes), *unsupported_norm(x)]
    if not takes_float16(x, dtypes[3], [*parameters, *others[17:19], attn_bias]):
        reasons.append(
            "float16 products, whose range holds neither what an autocast stream may nor 1 / sqrt(var) * gradient: they"
            " run beside a float16 x, where no backward pass can come"
        )
    if torch.promote_types(x.dtype, dtypes[3]) != x.dtype:
        reasons.append(f"x is {x.dtype}, and autocast's products are {dtypes[3]}")
    if not parameters[8].numel():
        reasons.append("an MLP of no hidden units")
    if x.shape[2] // num_heads > MAX_HEAD_DIM:
        reasons.append(f"head dimension {x.shape[2] // num_heads}, and the kernels take at most {MAX_HEAD_DIM}")
    return [*reasons, *unsupported_rope(rope_cos, rope_sin, dtypes[3]), *unsupported_scale(others[13])]


def takes_float16(x: torch.Tensor, dtype: torch.dtype, trained: list[torch.Tensor | None]) -> bool:
    """Whether the op takes x beside products in `dtype`, as far as float16's range goes; trained: all that may be."""
    return dtype != torch.float16 or (x.dtype == dtype and not dispatch.needs_grad(x, *trained))


def takes_block(x: torch.Tensor, weights: list[torch.Tensor], trained: Callable[[], list]) -> bool:
    """Whether these linear layers' weights are a block's whose dtypes the op takes, beside x. trained: has all that may
    be."""
    dtype = weights[0].dtype
    if dispatch.autocasting(x):
        dtype = _common.compute_dtype(x, weights[0])
        fits = torch.promote_types(x.dtype, dtype) == x.dtype
    else:
        fits = len({weight.dtype for weight in weights}) == 1
    return fits and (dtype != torch.float16 or takes_float16(x, dtype, trained()))


def _by_name(args: tuple) -> tuple[torch.Tensor, dict]:
    x, *rest = args
    return x, dict(zip(OP.parameters[1:], rest, strict=True))


def _reference(*args):
    x, rest = _by_name(args)
    return reference.transformer_block(x, **rest)


def _torch(*args):
    """By the single ops, each of which is chosen for itself."""
    x, given = _by_name(args)
    batch, tokens, dim = x.shape
    heads = given["num_heads"]
    norm1, qkv = (given["norm1_weight"], given["norm1_bias"]), (given["qkv_weight"], given["qkv_bias"])
    packed = layer_norm_linear(x, *norm1, *qkv, eps=given["eps1"]).view(batch, tokens, 3, heads, dim // heads)
    names = ("scale", "key_padding_mask", "attn_bias", "rope_cos", "rope_sin", "rope_interleaved")
    how = {name: given[name] for name in names}
    scales = [{name: given[f"{name}{number}"] for name in ("layer_scale", "drop_path_scale")} for number in (1, 2)]
    x = linear_residual(attention(packed, **how), given["proj_weight"], given["proj_bias"], x, **scales[0])
    norm2, fc1 = (given["norm2_weight"], given["norm2_bias"]), (given["fc1_weight"], given["fc1_bias"])
    fc2 = (given["fc2_weight"], given["fc2_bias"])
    if is_gated(fc1[0], fc2[0]):
        gated = gate(layer_norm_linear(x, *norm2, *fc1, eps=given["eps2"]), given["activation"])
        return linear_residual(gated, *fc2, x, **scales[1])
    how = {"eps": given["eps2"], "activation": given["activation"]}
    return layer_norm_mlp(x, *norm2, *fc1, *fc2, residual=x, **how, **scales[1])


def _prepare(x, *others):
    *parameters, num_heads, scale, eps1, eps2, activation = others[:17]
    scale1, scale2, drop1, drop2, key_padding_mask, attn_bias, *rope, interleaved, recompute_fc1 = others[17:]
    keep = dispatch.needs_grad(x, *parameters, scale1, scale2, attn_bias)
    scale = float((x.shape[2] // num_heads) ** -0.5 if scale is None else scale)
    vectors = (*parameters, scale1, scale2, drop1, drop2)
    how = (num_heads, scale, float(eps1), float(eps2), activation, bool(recompute_fc1), keep)
    dtype = _common.compute_dtype(x, parameters[2])
    options = (key_padding_mask, attn_bias, *alike_strides(*rope), interleaved)
    return x.contiguous(), *map(dense, vectors), *options, *how, dtype, None


def _product(x, *others):
    return _common.compute_dtype(x, others[2])


OP = Op("transformer_block", _check, _unsupported, _torch, TransformerBlockFunction, _prepare, _product)


def transformer_block(
    x: torch.Tensor,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    num_heads: int,
    scale: float | None = None,
    eps1: float = 1e-6,
    eps2: float = 1e-6,
    activation: str = "gelu",
    layer_scale1: torch.Tensor | None = None,
    layer_scale2: torch.Tensor | None = None,
    drop_path_scale1: torch.Tensor | None = None,
    drop_path_scale2: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_interleaved: bool = False,
    recompute_fc1: bool = False,
) -> torch.Tensor:
    """A pre-norm transformer block (arXiv 2010.11929, eqs. 2 and 3): one small launch for the weights, and five.

        x1 = x + drop_path_scale1 * layer_scale1 * proj(attention(qkv(norm1(x))))
        out = x1 + drop_path_scale2 * layer_scale2 * fc2(activation(fc1(norm2(x1))))

    x (B, N, D), in the linear layers' dtype or wider; norms (D,); qkv (3 D, D), rows in the order q, k, v; proj (D, D);
    fc1 (M, D), fc2 (D, M), or gated, activation(gate) * value in place of activation (arXiv 2002.05202), fc1 (2 M, D),
    the gates first; biases or None; num_heads divides D; scale defaults to (D / num_heads) ** -0.5; activation
    as in `layer_norm_mlp`; layer-scales (D,) and drop-path scales (B,) as in `linear_residual`; masks and a rotary
    position embedding as in `attention`. recompute_fc1: on the kernels, keep no output of fc1 for a backward pass, and
    run its product once more in it: in bfloat16, with an MLP of 4 D, 12 bytes a token and channel, not 20. Returns
    (B, N, D) in x's dtype. Sums are float32, and gradients are rounded once, to their parameter's dtype. Raises
    TypeError for a dtype, ValueError for a shape, name or device that does not fit, before any launch.
    """
    layers = (norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    layers += (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    how = (num_heads, scale, eps1, eps2, activation)
    scales = (layer_scale1, layer_scale2, drop_path_scale1, drop_path_scale2)
    options = (key_padding_mask, attn_bias, rope_cos, rope_sin, rope_interleaved, recompute_fc1)
    run, args = dispatch.choose(OP, (x, *layers, *how, *scales, *options))
    carry = carry_of(OP, run)
    return run(*args) if carry is None else carried(carry, run, args)


def run_transformer_block(args: tuple, otherwise: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`transformer_block` of all its arguments in order, x first; in place of running in PyTorch, `otherwise()`."""
    run, args = dispatch.choose(OP, args)
    carry = carry_of(OP, run)
    if run is OP.torch:
        return otherwise()
    return run(*args) if carry is None else carried(carry, run, args)


def carried(carry: Carry, run: Callable[..., torch.Tensor], args: tuple) -> torch.Tensor:
    """run(*args) with the carry in place of the last of args, leaving in it what is known of the result."""
    out = run(*args[:-1], carry)
    carry.leave(out, carry.stream)
    return out


def carry_of(op: Op, run: Callable) -> Carry | None:
    """What a call of `op` that `run` was chosen for is handed, and hands on: None where nobody is `carrying`, and in
    PyTorch, which leaves nothing."""
    carry = None if torch.compiler.is_compiling() else getattr(_here, "carry", None)
    if carry is not None and run in (op.torch, *op.others.values()):
        carry.leave(None, (None, None, None))
        return None
    return carry


_here = threading.local()


@contextlib.contextmanager
def carrying() -> Iterator[None]:
    """In the `with` body, a call of `transformer_block` with what the last one, or `patch_embed`, returned begins with
    the row statistics, and the copy, that were left for it. In inference mode, where nobody notices, nothing may change
    in place what they returned."""
    before = getattr(_here, "carry", None)
    _here.carry = Carry()
    try:
        yield
    finally:
        _here.carry = before
