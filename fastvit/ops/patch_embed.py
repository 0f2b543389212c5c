"""Patch embedding, from image to token sequence, as one op; see `fastvit.reference.patch_embed` and
`fastvit.kernels.patch_embed`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastvit import dispatch, reference
from fastvit.dispatch import Op

from . import _common
from ._common import Operator, dense, launchers, or_none, statistics_dtype
from .transformer_block import carried, carry_of


def _tokens_dtype(dtype, pos_embed, prefix):
    for rows in (pos_embed, prefix):
        dtype = dtype if rows is None else torch.promote_types(dtype, rows.dtype)
    return dtype


def _fake_forward(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, statistics):
    batch, _, height, width = image.shape
    embed_dim, _, patch_height, patch_width = weight.shape
    tokens = height // patch_height * (width // patch_width) + (0 if prefix is None else prefix.shape[0])
    out = weight.new_empty(batch, tokens, embed_dim, dtype=out_dtype)
    groups = launchers("transformer_block").groups_of(embed_dim)
    shape = (2, groups, batch * tokens) if statistics else (0,)
    return out, image.new_empty(shape, dtype=statistics_dtype(out) if statistics else image.dtype)


def _backward(dtokens, image, weight, bias, pos_embed, prefix, mean, std, dtype, needs):
    launch = launchers("patch_embed").patch_embed_backward
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    needs_image, needs_weight, needs_bias, needs_position, needs_prefix = needs
    which = (needs_image, needs_weight, needs_bias, needs_position or needs_prefix)
    dimage, dweight, dbias, by_token = launch(dtokens, image, weight, prefix_rows, mean, std, dtype, which)
    # Clones: what is handed out as gradients must not share memory.
    dposition = by_token[-pos_embed.shape[0] :].clone() if needs_position else None
    dprefix = by_token[:prefix_rows].clone() if needs_prefix else None
    grads = (dimage, dweight, dbias, dposition, dprefix)
    return _common.gradients(grads, (image, weight, bias, pos_embed, prefix))


def _fake_backward(dtokens, image, weight, bias, pos_embed, prefix, mean, std, dtype, needs):
    dimage, *rest = _common.fake_gradients(dtokens, (image, weight, bias, pos_embed, prefix), needs)
    return torch.empty_like(image) if needs[0] else dimage, *rest


_GIVEN = "Tensor image, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, float[]? mean, float[]? std, "
_GIVEN += "ScalarType dtype"
FORWARD = Operator(
    "patch_embed",
    f"patch_embed_forward({_GIVEN}, ScalarType out_dtype, bool statistics) -> (Tensor, Tensor)",
    _fake_forward,
)
BACKWARD = Operator(
    "patch_embed",
    f"patch_embed_backward(Tensor dtokens, {_GIVEN}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)


class PatchEmbedFunction(torch.autograd.Function):
    """patch_embed on the kernels: (image (B, C, H, W), weight (D, C, ph, pw), bias, pos_embed, prefix, mean, std,
    carry) -> (B, P + N, D). carry: a Carry, which is left what the first block needs, or None."""

    @staticmethod
    def forward(ctx, image, weight, bias, pos_embed, prefix, mean, std, carry=None):
        ctx.save_for_backward(image, weight, bias, pos_embed, prefix)
        dtype = _common.compute_dtype(weight, weight)
        tensors, how = (image, weight, bias, pos_embed, prefix), (mean, std, dtype)
        ctx.how = how
        out_dtype = _tokens_dtype(dtype, pos_embed, prefix)
        # Where products read a copy, the statistics are that's, which takes the rows' means first.
        statistics = carry is not None and not launchers("transformer_block").reads_copy(out_dtype, dtype)
        out, stats = FORWARD.of(*tensors)(*tensors, *how, out_dtype, statistics)
        if carry is not None:
            carry.stream = (None, None, stats if statistics else None)
        return out

    @staticmethod
    def backward(ctx, dtokens):
        needs, saved = ctx.needs_input_grad[:5], ctx.saved_tensors
        if _common.differentiating_again(dtokens):

            def embed(image, weight, bias, pos_embed, prefix):
                mean, std, dtype = ctx.how
                weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
                return reference.patch_embed(
                    image, weight, bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std
                )

            return *_common.again_differentiable(embed, saved, needs, dtokens), None, None, None
        grads = BACKWARD.of(dtokens, *saved)(dtokens.contiguous(), *saved, *ctx.how, list(needs))
        return *or_none(grads, needs), None, None, None


def _check(image, weight, bias, pos_embed, prefix, mean, std):
    name = "patch_embed"
    optional = ("bias", "pos_embed", "prefix")
    _common.check_tensors(name, optional, weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix)
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"{name}: image must be a torch.Tensor, got {type(image).__name__}")
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise TypeError(f"{name}: image must be floating-point or uint8, got {image.dtype}")
    if image.dim() != 4:
        raise ValueError(f"{name}: image must have shape (B, C, H, W), got {tuple(image.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"{name}: weight must have shape (D, C, ph, pw), got {tuple(weight.shape)}")
    _, channels, height, width = image.shape
    embed_dim, weight_channels, patch_height, patch_width = weight.shape
    if 0 in weight.shape:
        raise ValueError(f"{name}: weight must have no empty dimension, got {tuple(weight.shape)}")
    if channels != weight_channels:
        raise ValueError(f"{name}: image has {channels} channels, but weight is for {weight_channels}")
    if height % patch_height or width % patch_width or not height or not width:
        raise ValueError(
            f"{name}: image size {height}x{width} is not divisible by the patch size {patch_height}x{patch_width}"
        )
    _common.check_shape(name, "bias", bias, (embed_dim,), "(D,)")
    _common.check_operands(name, weight, weight=weight, bias=bias)
    if prefix is not None and (prefix.dim() != 2 or prefix.shape[1] != embed_dim):
        raise ValueError(f"{name}: prefix must have shape (P, D) with D = {embed_dim}, got {tuple(prefix.shape)}")
    patches = height // patch_height * (width // patch_width)
    tokens = patches + (0 if prefix is None else prefix.shape[0])
    fits = pos_embed is None or (pos_embed.dim() == 2 and pos_embed.shape[1] == embed_dim)
    if not fits or (pos_embed is not None and pos_embed.shape[0] != patches and pos_embed.shape[0] != tokens):
        raise ValueError(
            f"{name}: pos_embed must have shape (N, D) = {(patches, embed_dim)} or (P + N, D) = {(tokens, embed_dim)}, "
            f"got {tuple(pos_embed.shape)}"
        )
    for label, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if not isinstance(values, (tuple, list)):
            raise TypeError(f"{name}: {label} must be a tuple or list of {channels} numbers, got {values!r}")
        if len(values) != channels:
            raise ValueError(f"{name}: {label} must have one value per channel ({channels}), got {len(values)}")
        for value in values:
            _common.check_number(name, label, value, positive=label == "std")
    if image.device != weight.device:
        raise ValueError(f"{name}: weight is on {weight.device}, but image is on {image.device}")


def _unsupported(image, weight, bias, pos_embed, prefix, mean, std):
    dtypes = [_common.compute_dtype(weight, weight)]
    dtypes += [tensor.dtype for tensor in (pos_embed, prefix) if tensor is not None]
    if image.is_floating_point():
        dtypes.append(image.dtype)
    return [*dispatch.missing_requirements(image), *_common.unsupported_dtypes(*dtypes)]


def _convolution(image, weight, bias, pos_embed, prefix, mean, std):
    if image.is_cuda and _product(image, weight, *[None] * 5) == torch.float32 and torch.backends.cudnn.allow_tf32:
        raise RuntimeError("on a GPU a convolution of float32 rounds to TF32")
    image = reference.ops.normalised_pixels(image, weight.dtype, mean, std)
    tokens = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return reference.ops.assemble_tokens(tokens, pos_embed, prefix)


def _torch(image, weight, bias, pos_embed, prefix, mean, std):
    if image.is_cpu and image.dtype == weight.dtype == torch.float32 and mean is None and std is None:
        # The same sums. In float32 on a CPU a convolution is the faster way to them.
        return _convolution(image, weight, bias, pos_embed, prefix, mean, std)
    return reference.patch_embed(image, weight, bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std)


def _prepare(image, weight, bias, pos_embed, prefix, mean, std):
    tensors = (image, dense(weight), dense(bias), dense(pos_embed), dense(prefix))
    mean, std = (None if values is None else [float(value) for value in values] for values in (mean, std))
    return *tensors, mean, std, None


def _product(image, weight, bias, pos_embed, prefix, mean, std):
    return _common.compute_dtype(weight, weight)


_OTHERS = {"convolution": _convolution}
OP = Op("patch_embed", _check, _unsupported, _torch, PatchEmbedFunction, _prepare, _product, _OTHERS)


def patch_embed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """Image to token sequence: patches, linear projection, positions, prefix rows (arXiv 2010.11929, equation 1).

    image (B, C, H, W) of any strides (NCHW, channels_last, ...), floating-point, or uint8, taken as pixel / 255; weight
    (D, C, ph, pw); bias (D,); pos_embed (N, D), or (P + N, D) when the prefix rows have positions too; prefix (P, D):
    class, register and distillation rows; mean, std: C floats, applied to the image as (image - mean) / std. Returns
    (B, P + N, D) in the widest dtype of weight (autocast's when it is on), pos_embed and prefix. Raises TypeError for
    a dtype, ValueError for a shape, size or device that does not fit, before any launch.
    """
    run, args = dispatch.choose(OP, (image, weight, bias, pos_embed, prefix, mean, std))
    carry = carry_of(OP, run)
    return run(*args) if carry is None else carried(carry, run, args)
