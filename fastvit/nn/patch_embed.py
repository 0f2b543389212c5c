"""Image to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastvit import ops

from .layers import can_fuse, check_positive, is_integer, refuse_scripting, traced

FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


def to_pair(name: str, value) -> tuple[int, int]:
    """(height, width) of one positive integer or of two. Raises ValueError, naming `name`, for anything else."""
    pair = (value, value) if is_integer(value) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(is_integer(side) and side > 0 for side in pair):
        raise ValueError(f"{name} is {value!r}, expected a positive integer or (height, width)")
    return pair


def resample_patch_weight(weight: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """A patch projection (D, C, ph, pw) for patches of another size: the least-squares fit to what it gives for a patch
    that was resized, bicubic with antialiasing (arXiv 2212.08013, section 3.4), as timm does it."""
    ph, pw = weight.shape[2:]
    pixels = torch.eye(ph * pw, device=weight.device).reshape(-1, 1, ph, pw)
    resize = F.interpolate(pixels, patch_size, mode="bicubic", antialias=True).flatten(1).T
    return (weight.float().flatten(2) @ torch.linalg.pinv(resize)).unflatten(2, patch_size).to(weight.dtype)


@torch.fx.wrap
def check_image(image, in_chans: int, img_size: tuple[int, int] | None, patch_size: tuple[int, int]) -> torch.Tensor:
    """image, if it is (B, in_chans, H, W), uint8 or floating point, of size img_size if that is given and a multiple of
    patch_size. Raises as `PatchEmbed.forward` says; in a graph that torch.fx traces, when the graph runs."""
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"image is a {type(image).__name__}, expected a torch.Tensor (batch, channels, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image has dtype {image.dtype}, expected floating point or uint8")
    if image.dim() != 4 or image.shape[1] != in_chans:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected (batch, {in_chans}, H, W)")
    size = tuple(image.shape[2:])
    if img_size is not None and size != img_size:
        raise ValueError(f"image is {size[0]} x {size[1]}, expected {img_size[0]} x {img_size[1]}")
    check_multiple("image", size, patch_size)
    return image


def check_multiple(name: str, size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raise ValueError unless the patch divides the size."""
    if size[0] % patch_size[0] or size[1] % patch_size[1]:
        patch = f"{patch_size[0]} x {patch_size[1]}"
        raise ValueError(f"{name} is {size[0]} x {size[1]}, expected multiples of the patch, {patch}")


@torch.fx.wrap
def prepare_image(image, like: torch.Tensor, mean, std, patch_size: tuple[int, int]) -> torch.Tensor:
    """image as a projection with weights `like` takes it: uint8 as pixel / 255, normalised in float32 or wider, filled
    up with zeros at the right and the bottom to a multiple of patch_size, in the dtype of `like`."""
    wide = torch.promote_types(image.dtype if image.is_floating_point() else like.dtype, torch.float32)
    if image.dtype == torch.uint8:
        image = image.to(wide) / 255
    if mean is not None:
        image = image.to(wide) - torch.tensor(mean, dtype=wide, device=image.device)[:, None, None]
    if std is not None:
        image = image.to(wide) / torch.tensor(std, dtype=wide, device=image.device)[:, None, None]
    below, right = -image.shape[2] % patch_size[0], -image.shape[3] % patch_size[1]
    return F.pad(image, (0, right, 0, below)).to(like.dtype)


@torch.fx.wrap
def assemble_tokens(tokens: torch.Tensor, pos_embed, prefix) -> torch.Tensor:
    """Prefix rows (P, D) before the patch tokens (B, N, D), and positions: (N, D) or, with the prefix's, (P + N, D)."""
    prefix_covered = prefix is not None and pos_embed is not None and pos_embed.shape[0] > tokens.shape[1]
    if pos_embed is not None and not prefix_covered:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens + pos_embed if prefix_covered else tokens


class PatchEmbed(nn.Module):
    """Non-overlapping patches and their linear projection (arXiv 2010.11929, eq. 1), a drop-in for timm's `PatchEmbed`.

    Parameters: proj.weight (D, C, ph, pw) and, with `bias`, proj.bias (D,). img_size: the (height, width) that images
    must have, an int for a square; None or strict_img_size=False takes any that the patch divides, and with
    dynamic_img_pad any at all, filled up with zeros, after normalisation, at the right and the bottom. num_patches
    counts what comes out, so those at the edge as well. flatten: tokens (B, N, D), else (B, D, H / ph, W / pw), or what
    output_fmt says: "NLC", "NCL" (B, D, N), "NHWC" or "NCHW".

    Raises ValueError for sizes that are no positive integers, for another output_fmt, for a norm_layer, which it has
    not, and when the patch does not divide img_size.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer=None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if norm_layer is not None:
            raise ValueError(f"norm_layer is {norm_layer!r}, but fastvit.nn.PatchEmbed supports only norm_layer=None")
        if output_fmt is not None and output_fmt not in FORMATS:
            raise ValueError(f"output_fmt is {output_fmt!r}, expected one of {FORMATS} or None")
        check_positive("in_chans", in_chans)
        check_positive("embed_dim", embed_dim)
        self.patch_size = to_pair("patch_size", patch_size)
        self.in_chans = in_chans
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.flatten = flatten and output_fmt is None
        self.output_fmt = "NCHW" if output_fmt is None else output_fmt
        self.img_size = None
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype
        )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Expect images of another size from now on, and cut them into patches of another size, the projection's
        weights being resampled: see `resample_patch_weight`. Raises ValueError as the constructor does."""
        img_size = self.img_size if img_size is None else to_pair("img_size", img_size)
        patch_size = self.patch_size if patch_size is None else to_pair("patch_size", patch_size)
        if img_size is not None and not self.dynamic_img_pad:
            check_multiple("img_size", img_size, patch_size)
        if patch_size != self.patch_size:
            weight = self.proj.weight
            resampled = resample_patch_weight(weight.detach(), patch_size)
            self.proj.weight = nn.Parameter(resampled, requires_grad=weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = patch_size
        self.patch_size, self.img_size = patch_size, img_size
        self.grid_size = None if img_size is None else self.dynamic_feat_size(img_size)
        self.num_patches = None if img_size is None else self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token: of the longer side, or of both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the token grid of an image of size (height, width)."""
        if not self.dynamic_img_pad:
            check_multiple("img_size", img_size, self.patch_size)
        return -(-img_size[0] // self.patch_size[0]), -(-img_size[1] // self.patch_size[1])

    def can_fuse(self) -> bool:
        """Whether one op gives what calling `proj` would."""
        proj = self.proj
        return (
            can_fuse((proj,), ((nn.Conv2d,),))
            and proj.kernel_size == proj.stride == self.patch_size
            and proj.padding == (0, 0)
            and proj.dilation == (1, 1)
            and proj.groups == 1
        )

    def forward(
        self,
        image: torch.Tensor,
        pos_embed: torch.Tensor | None = None,
        prefix: torch.Tensor | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> torch.Tensor:
        """image (B, C, H, W), floating point or uint8 (taken as pixel / 255) -> tokens (B, P + N, D).

        pos_embed (N, D) or (P + N, D) is added to the tokens, prefix (P, D) goes before them; mean and std, one float
        per channel, first normalise the image. Raises TypeError for another dtype, ValueError for another shape.
        """
        if isinstance(prefix, torch.Tensor) and not self.flatten and self.output_fmt in ("NCHW", "NHWC"):
            raise ValueError(f"prefix came with output_fmt {self.output_fmt!r}, expected no prefix in a grid of tokens")
        ph, pw = self.patch_size
        fused = not traced(image) and self.can_fuse()
        size = self.img_size if self.strict_img_size else None
        in_chans = getattr(self.proj, "in_channels", self.in_chans)
        image = check_image(image, in_chans, size, (1, 1) if self.dynamic_img_pad else self.patch_size)
        if not fused or image.shape[2] % ph or image.shape[3] % pw:
            image = prepare_image(image, next(self.proj.parameters()), mean, std, self.patch_size)
            mean = std = None
        if fused:
            proj = self.proj
            tokens = ops.patch_embed(
                image, proj.weight, proj.bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std
            )
        else:
            features = self.proj(image)
            tokens = features.flatten(2).transpose(1, 2)
            if pos_embed is not None or prefix is not None:
                tokens = assemble_tokens(tokens, pos_embed, prefix)
        if self.flatten or self.output_fmt == "NLC":
            return tokens
        if self.output_fmt == "NCL":
            return tokens.transpose(1, 2).contiguous()
        grid = (image.shape[2] // ph, image.shape[3] // pw) if fused else (features.shape[2], features.shape[3])
        if self.output_fmt == "NHWC":
            return tokens.unflatten(1, grid)
        return tokens.transpose(1, 2).contiguous().unflatten(2, grid)
