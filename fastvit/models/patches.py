"""What a model does to patches before its blocks see them: positions of another grid, rotary ones, mask tokens,
dropout."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastvit.nn.patch_embed import prepare_image

from .weights import resample_position_table


@torch.fx.wrap
def drop_patches(x: torch.Tensor, prob: float, num_prefix_tokens: int) -> torch.Tensor:
    """x (B, P + N, D) with a random share 1 - prob of each image's patches, at least one, in no order; timm's draws."""
    prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
    batch, count, embed_dim = patches.shape
    order = torch.randn(batch, count, device=x.device).argsort(dim=-1)
    kept = order[:, : max(1, int(count * (1 - prob))), None]
    return torch.cat([prefix, patches.gather(1, kept.expand(-1, -1, embed_dim))], dim=1)


class PatchDropout(nn.Module):
    """In training, dropout of whole patches at the rate `prob` (arXiv 2212.00794): see `drop_patches`."""

    def __init__(self, prob: float, num_prefix_tokens: int):
        super().__init__()
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, P + N, D) -> (B, P + K, D), the first num_prefix_tokens as they are."""
        return drop_patches(x, self.prob, self.num_prefix_tokens) if self.training and self.prob else x


def normalise_pixels(
    x: torch.Tensor, like: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Images x, uint8 ones normalised, in the dtype of `like`; torch.fx cannot ask for x's dtype before it runs."""
    return prepare_image(x, like, mean, std, (1, 1)) if getattr(x, "dtype", None) == torch.uint8 else x


def grid_of(image: torch.Tensor, patch_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the patches of image (B, C, H, W), those at the edge included; None for another shape."""
    size = tuple(getattr(image, "shape", ()))[2:]
    if len(size) != 2 or 0 in size:
        return None  # what is wrong with the image, the patch embedding will say
    return tuple(-(-side // patch) for side, patch in zip(size, patch_size, strict=True))


def fit_positions(
    table: torch.Tensor,
    image: torch.Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    prefix_rows: int,
    policy: str,
) -> torch.Tensor:
    """The position table (1, prefix_rows + N, D), made for `grid_size`, resampled to the grid of the image."""
    grid = grid_of(image, patch_size)
    return table if grid is None else resample_position_table(table, grid_size, grid, prefix_rows, policy)


def rotary_of(
    image: torch.Tensor, patch_size: tuple[int, int], head_dim: int, temperature: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`rotary_tables` for the patches of image (B, C, H, W), on the device of `like`, in float32 or its wider dtype."""
    grid = grid_of(image, patch_size)
    if grid is None:
        return None
    how = (grid, head_dim, temperature, like.device, torch.promote_types(like.dtype, torch.float32))
    return _kept_tables(*how) if _may_keep(image) else rotary_tables(*how)


def _may_keep(x: torch.Tensor) -> bool:
    """Whether tensors that are made now are plain ones, which others may have too: not where something traces,
    transforms or captures."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not _get_current_dispatch_mode_stack()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def rotary_tables(
    grid: tuple[int, int], head_dim: int, temperature: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (rows * columns, head_dim / 2) of the angles by which DINOv3 (arXiv 2508.10104) rotates each patch's
    pairs of columns: for y, then x, the centre of the patch in [-1, 1], times 2 pi / temperature^(4 i / head_dim) for
    i below head_dim / 4."""
    how = {"device": device, "dtype": dtype}
    y, x = ((torch.arange(side, **how) + 0.5) / side * 2 - 1 for side in grid)
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    periods = temperature ** (torch.arange(head_dim // 4, **how) * 4 / head_dim)
    angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1)
    return angles.cos(), angles.sin()


@functools.lru_cache(maxsize=64)
def _kept_tables(*how) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        return rotary_tables(*how)


def put_mask_tokens(
    tokens: torch.Tensor,
    masks: torch.Tensor | None,
    mask_token: torch.Tensor | None,
    positions: torch.Tensor | None,
    prefix_tokens: int,
) -> torch.Tensor:
    """tokens (B, P + N, D) with mask_token (1, D) in place of the patches where masks (B, N) is True.

    positions (N, D) or (P + N, D), or None: the masked patches keep theirs. masks None changes nothing. Raises
    ValueError where there is no mask_token and for masks of another shape, TypeError for another dtype.
    """
    if masks is None:
        return tokens
    if mask_token is None:
        raise ValueError("masks came to a model without mask_token, expected one built with mask_token=True")
    patches = tokens[:, prefix_tokens:]
    if not isinstance(masks, torch.Tensor) or masks.dtype != torch.bool:
        raise TypeError(f"masks is {getattr(masks, 'dtype', type(masks).__name__)}, expected a tensor of torch.bool")
    if masks.shape != patches.shape[:2]:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, expected one a patch, {tuple(patches.shape[:2])}")
    masked = mask_token if positions is None else mask_token + positions[-patches.shape[1] :]
    return torch.cat([tokens[:, :prefix_tokens], torch.where(masks[..., None], masked, patches)], dim=1)
