"""The Vision Transformer, DeiT and DINOv2 as one module on fused blocks, with timm's parameter names and interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvit import ops
from fastvit.nn import Block, PatchEmbed, SwiGLU
from fastvit.nn.layers import ACTIVATION_LAYERS, LAYER_NORM, bypassable, norm_complete

from .config import AVERAGING_POOLS, MLPS, ViTConfig


class VisionTransformer(nn.Module):
    """A Vision Transformer (arXiv 2010.11929), DeiT (2012.12877) or DINOv2 (2304.07193), as `config` describes it.

    state_dict has timm's keys, shapes and order; the same seed gives the weights that timm's default initialisation
    gives. Images are (B, C, H, W): floating point ones are taken as normalised already, uint8 ones are normalised
    with the config's mean and std inside the patch embedding. Wrong images raise as `nn.PatchEmbed.forward` says.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.distilled_training = False
        embed_dim = config.embed_dim
        layer_norm = partial(nn.LayerNorm, eps=config.norm_eps)

        self.patch_embed = PatchEmbed(config.img_size, config.patch_size, config.in_chans, embed_dim)
        # Tables first, modules after: the order of timm's state_dict.
        table_rows = self.patch_embed.num_patches + (0 if config.no_embed_class else config.num_prefix_tokens)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, embed_dim)) if config.reg_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, table_rows, embed_dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if config.distilled else None
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        # Stochastic depth grows linearly with depth (arXiv 1603.09382, section 3).
        drop_path_rates = [config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    config.num_heads,
                    mlp_ratio=config.mlp_ratio,
                    qkv_bias=config.qkv_bias,
                    proj_drop=config.proj_drop_rate,
                    attn_drop=config.attn_drop_rate,
                    init_values=config.init_values,
                    drop_path=drop_path,
                    act_layer=ACTIVATION_LAYERS[config.activation],
                    norm_layer=layer_norm,
                    mlp_layer=MLPS[config.mlp],
                )
                for drop_path in drop_path_rates
            )
        )
        before, after = config.final_norm and not config.norm_after_pool, config.final_norm and config.norm_after_pool
        self.norm = layer_norm(embed_dim) if before else nn.Identity()
        self.fc_norm = layer_norm(embed_dim) if after else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self._new_heads()
        self.init_weights()

    def _new_heads(self) -> None:
        """Untrained classifiers as torch initialises a linear layer."""
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        for name in ("head", "head_dist") if self.config.distilled else ("head",):
            classes = self.config.num_classes
            head = nn.Linear(self.config.embed_dim, classes, **like) if classes else nn.Identity()
            setattr(self, name, head.train(self.training))

    @torch.no_grad()
    def init_weights(self) -> None:
        """timm's default start: linear weights and positions normal with std 0.02, cut at 2; biases 0; tokens about 0;
        the patch projection as torch initialises a convolution."""
        if self.dist_token is not None:
            _init_normal(self.dist_token)
        _init_normal(self.pos_embed)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        self.apply(_init_linear)

    # The width of what `forward_features` and `forward_head(pre_logits=True)` give, and timm's other two names of it.
    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    num_features = head_hidden_size = embed_dim

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def global_pool(self) -> str:
        return self.config.global_pool

    @property
    def num_prefix_tokens(self) -> int:
        return self.config.num_prefix_tokens

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W) -> tokens (B, P + N, D) with positions, as the first block takes them."""
        prefix = [token[0] for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        raw = images.dtype == torch.uint8 if isinstance(images, torch.Tensor) else False
        tokens = self.patch_embed(
            images,
            pos_embed=self.pos_embed[0],
            prefix=torch.cat(prefix) if len(prefix) > 1 else prefix[0] if prefix else None,
            mean=self.config.mean if raw else None,
            std=self.config.std if raw else None,
        )
        return self.pos_drop(tokens)

    def _run_block(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W) -> tokens (B, P + N, D), the prefix first, after `norm` where the model has it."""
        x = self.embed(images)
        for block in self.blocks:
            x = self._run_block(block, x)
        return _normalise(self.norm, x)

    def forward_head(self, tokens: torch.Tensor, pre_logits: bool = False):
        """tokens (B, P + N, D) of `forward_features` -> logits (B, num_classes), or with pre_logits, and where there is
        no classifier, the pooled features (B, D); for global_pool "" both are per token.

        A distilled model gives the mean over its two heads, or both apart, as a tuple, in training after
        `set_distilled_training()`.
        """
        if self.config.distilled:
            x, x_dist = self.head_drop(tokens[:, 0]), self.head_drop(tokens[:, 1])
            if pre_logits:
                return (x + x_dist) / 2
            x, x_dist = self.head(x), self.head_dist(x_dist)
            return (x, x_dist) if self.distilled_training and self.training else (x + x_dist) / 2
        x = self.head_drop(_normalise(self.fc_norm, self._pool(tokens)))
        return x if pre_logits else self.head(x)

    def _pool(self, tokens: torch.Tensor) -> torch.Tensor:
        pool = self.config.global_pool
        if pool == "token":
            return tokens[:, 0]
        if pool in AVERAGING_POOLS:
            patches = tokens[:, self.num_prefix_tokens :]
            if pool == "avg":
                return patches.mean(dim=1)
            return patches.amax(dim=1) if pool == "max" else 0.5 * (patches.amax(dim=1) + patches.mean(dim=1))
        return tokens

    def forward(self, images: torch.Tensor):
        """images (B, C, H, W) -> what `forward_head` gives."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Outputs of chosen blocks, in order: (forward_features' tokens, list), or the list with intermediates_only.

        indices: the last n blocks for an int, every block for None, else block numbers (negative from the end). Each
        item is the patch tokens, (B, D, rows, columns) for output_fmt "NCHW" or (B, N, D) for "NLC", and with
        return_prefix_tokens the tuple (patches, prefix (B, P, D)). norm: apply the final norm to each. stop_early: run
        no block after the last chosen one. Raises ValueError for an index out of range or another output_fmt.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        chosen = self._block_indices(indices)
        last = max(chosen) if stop_early or intermediates_only else len(self.blocks) - 1
        x = self.embed(images)
        taken = []
        for index, block in enumerate(self.blocks[: last + 1]):
            x = self._run_block(block, x)
            if index in chosen:
                taken.append(_normalise(self.norm, x) if norm else x)

        rows_columns = self.patch_embed.dynamic_feat_size(images.shape[2:])
        intermediates = []
        for tokens in taken:
            patches = tokens[:, self.num_prefix_tokens :]
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, rows_columns).contiguous()
            with_prefix = return_prefix_tokens and self.num_prefix_tokens
            intermediates.append((patches, tokens[:, : self.num_prefix_tokens]) if with_prefix else patches)
        return intermediates if intermediates_only else (_normalise(self.norm, x), intermediates)

    def _block_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            count = depth if indices is None else indices
            if not 0 < count <= depth:
                raise ValueError(f"indices is {indices}, expected a number of blocks from 1 to {depth}")
            return set(range(depth - count, depth))
        if not indices or not all(-depth <= index < depth for index in indices):
            raise ValueError(f"indices is {indices}, expected block numbers from {-depth} to {depth - 1}")
        return {index % depth for index in indices}

    def get_intermediate_layers(
        self,
        images: torch.Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """Outputs of the last n blocks, or of the blocks numbered n: `forward_intermediates` under DINO's name.

        Items are (B, N, D), or (B, D, rows, columns) with reshape, or (patches, prefix) with return_prefix_tokens.
        """
        return self.forward_intermediates(
            images,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def get_classifier(self):
        """The classifier, or the pair (head, head_dist) of a distilled model."""
        return (self.head, self.head_dist) if self.config.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` outputs, 0 for none, and the pooling if one is given.

        The final norm stays where it is. Raises ValueError for an unknown pool or one that the model cannot have.
        """
        self.config = replace(
            self.config,
            num_classes=num_classes,
            global_pool=self.config.global_pool if global_pool is None else global_pool,
            fc_norm=self.config.norm_after_pool,
        )
        self._new_heads()

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the two heads' logits apart. Raises ValueError for a model that is not distilled."""
        if enable and not self.config.distilled:
            raise ValueError("set_distilled_training needs a distilled model, and this one is not")
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In backward, recompute each block from its input instead of keeping its activations (arXiv 1604.06174)."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that recipes leave out of weight decay, beside biases and norms."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that sort parameter names by depth, as timm's layer-wise learning-rate decay takes them."""
        return {
            "stem": r"^(?:cls_token|dist_token|reg_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _init_normal(tensor: torch.Tensor) -> None:
    # By inverting the distribution function, which takes one draw an element: torch's own trunc_normal_ draws
    # differently from release to release, and a seed should mean the same weights in all of them and in timm.
    tensor.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        _init_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SwiGLU):  # `apply` comes here after its linear layers
        module.init_weights()


def _normalise(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if bypassable((norm, LAYER_NORM)) and norm_complete(norm):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)
