"""What a model does to patches before its blocks see them: positions of another grid, mask tokens, dropout."""

from __future__ import annotations

import torch
from torch import nn

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


def fit_positions(
    table: torch.Tensor,
    image: torch.Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    prefix_rows: int,
    policy: str,
) -> torch.Tensor:
    """The position table (1, prefix_rows + N, D), made for `grid_size`, resampled to the grid of the image."""
    size = tuple(getattr(image, "shape", ()))[2:]
    if len(size) != 2 or 0 in size:
        return table  # what is wrong with the image, the patch embedding will say
    grid = tuple(-(-side // patch) for side, patch in zip(size, patch_size, strict=True))
    return resample_position_table(table, grid_size, grid, prefix_rows, policy)


def put_mask_tokens(
    tokens: torch.Tensor,
    masks: torch.Tensor | None,
    mask_token: torch.Tensor | None,
    positions: torch.Tensor,
    prefix_tokens: int,
) -> torch.Tensor:
    """tokens (B, P + N, D) with mask_token (1, D) in place of the patches where masks (B, N) is True.

    positions (N, D) or (P + N, D): the masked patches keep theirs. masks None changes nothing. Raises ValueError where
    there is no mask_token and for masks of another shape, TypeError for another dtype.
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
    masked = mask_token + positions[-patches.shape[1] :]
    return torch.cat([tokens[:, :prefix_tokens], torch.where(masks[..., None], masked, patches)], dim=1)
