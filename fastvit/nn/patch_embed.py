"""Image to tokens."""

from __future__ import annotations

import torch
from torch import nn

from fastvit import ops

from .layers import bypassable


def to_pair(name: str, value) -> tuple[int, int]:
    """(height, width) of one positive integer or of two. Raises ValueError, naming `name`, for anything else."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} is {value!r}, expected a positive integer or (height, width)")
    return pair


class PatchEmbed(nn.Module):
    """Non-overlapping patches and their linear projection (arXiv 2010.11929, eq. 1), a drop-in for timm's `PatchEmbed`.

    Parameters: proj.weight (D, C, ph, pw) and, with `bias`, proj.bias (D,). img_size: the (height, width) that images
    must have, an int for a square; None or strict_img_size=False takes any that the patch divides. output_fmt: None
    for tokens (B, N, D), "NHWC" for (B, H / ph, W / pw, D).

    Raises ValueError for what it has not: norm_layer, flatten=False, dynamic_img_pad=True, another output_fmt; and
    when the patch does not divide the image.
    """

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
        for name, value, only in (
            ("norm_layer", norm_layer, (None,)),
            ("flatten", flatten, (True,)),
            ("dynamic_img_pad", dynamic_img_pad, (False,)),
            ("output_fmt", output_fmt, (None, "NHWC")),
        ):
            if value not in only:
                raise ValueError(f"{name} is {value!r}, but fastvit.nn.PatchEmbed supports only {only}")
        self.patch_size = to_pair("patch_size", patch_size)
        self.strict_img_size = strict_img_size
        self.output_fmt = output_fmt
        self.img_size = self.grid_size = self.num_patches = None
        if img_size is not None:
            self.set_input_size(img_size)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype
        )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Expect images of another size from now on. Raises ValueError for a new patch_size, which it has not."""
        if patch_size is not None and to_pair("patch_size", patch_size) != self.patch_size:
            raise ValueError(f"patch_size is {patch_size}, expected the {self.patch_size} the module was built with")
        if img_size is not None:
            self.img_size = to_pair("img_size", img_size)
            self.grid_size = self._grid("img_size", *self.img_size)
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _grid(self, name: str, height: int, width: int) -> tuple[int, int]:
        ph, pw = self.patch_size
        if height % ph or width % pw:
            raise ValueError(f"{name} is {height} x {width}, expected multiples of the patch, {ph} x {pw}")
        return height // ph, width // pw

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token: of the longer side, or of both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the token grid of an image of size (height, width)."""
        return self._grid("img_size", *img_size)

    def forward(
        self,
        image: torch.Tensor,
        *,
        pos_embed: torch.Tensor | None = None,
        prefix: torch.Tensor | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> torch.Tensor:
        """image (B, C, H, W), floating point or uint8 (taken as pixel / 255) -> tokens (B, P + N, D).

        pos_embed (N, D) or (P + N, D) is added to the tokens, prefix (P, D) goes before them; mean and std, one float
        per channel, first normalise the image. Raises TypeError for another dtype, ValueError for another shape.
        """
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"image is a {type(image).__name__}, expected a torch.Tensor (batch, channels, H, W)")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"image has dtype {image.dtype}, expected floating point or uint8")
        if image.dim() != 4 or image.shape[1] != self.proj.in_channels:
            raise ValueError(f"image has shape {tuple(image.shape)}, expected (batch, {self.proj.in_channels}, H, W)")
        size = tuple(image.shape[2:])
        if self.strict_img_size and self.img_size is not None and size != self.img_size:
            raise ValueError(f"image is {size[0]} x {size[1]}, expected {self.img_size[0]} x {self.img_size[1]}")
        grid = self._grid("image", *size)

        if bypassable((self.proj, (nn.Conv2d,))):
            tokens = ops.patch_embed(
                image, self.proj.weight, self.proj.bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std
            )
        else:
            tokens = self._by_calling_proj(image, pos_embed, prefix, mean, std)
        return tokens if self.output_fmt is None else tokens.unflatten(1, grid)

    def _by_calling_proj(self, image, pos_embed, prefix, mean, std):
        """What the fused op does, with `proj` called as a module so that its hooks or its stand-in take part."""
        dtype = self.proj.weight.dtype
        wide = torch.promote_types(image.dtype if image.is_floating_point() else dtype, torch.float32)
        if image.dtype == torch.uint8:
            image = image.to(wide) / 255
        if mean is not None:
            image = image.to(wide) - torch.tensor(mean, dtype=wide, device=image.device)[:, None, None]
        if std is not None:
            image = image.to(wide) / torch.tensor(std, dtype=wide, device=image.device)[:, None, None]
        tokens = self.proj(image.to(dtype)).flatten(2).transpose(1, 2)

        prefix_covered = prefix is not None and pos_embed is not None and pos_embed.shape[0] > tokens.shape[1]
        if pos_embed is not None and not prefix_covered:
            tokens = tokens + pos_embed
        if prefix is not None:
            tokens = torch.cat([prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens + pos_embed if prefix_covered else tokens
