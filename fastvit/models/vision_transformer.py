"""Vision Transformers, from DeiT to DINOv3 and CLIP, as one module on fused blocks, with timm's parameter names and
interface."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvit import dispatch, ops
from fastvit.nn import AttentionPoolLatent, Block, PatchEmbed, SwiGLU
from fastvit.nn.attention import Rope
from fastvit.nn.block import block_indices
from fastvit.nn.layers import ACTIVATION_LAYERS, LAYER_NORM, can_fuse, init_normal, norm_complete, traced
from fastvit.nn.patch_embed import assemble_tokens

from .config import AVERAGING_POOLS, MLPS, POOLS, ViTConfig
from .patches import PatchDropout, fit_positions, normalise_pixels, put_mask_tokens, rotary_of
from .weights import resample_position_table

# Their control flow depends on the image and the masks: torch.fx records the call instead of looking inside.
torch.fx.wrap("assemble_tokens")
torch.fx.wrap("fit_positions")
torch.fx.wrap("normalise_pixels")
torch.fx.wrap("put_mask_tokens")
torch.fx.wrap("rotary_of")


def _from_config(field: str) -> property:
    return property(lambda model: getattr(model.config, field))


class VisionTransformer(nn.Module):
    """A Vision Transformer (arXiv 2010.11929), DeiT (2012.12877), DINOv2 (2304.07193), DINOv3 (2508.10104), or the
    image tower of CLIP (2103.00020) or SigLIP (2303.15343), as `config` describes it.

    state_dict has the keys, shapes and order of timm's VisionTransformer, also of DINOv3, which timm has in another
    class; in float32 the same seed gives the weights that timm's default initialisation gives. Images are (B, C, H, W):
    floating point ones are taken as normalised already, uint8 ones are normalised with the config's mean and std inside
    the patch embedding. Wrong images raise as `nn.PatchEmbed.forward` says.

    `pretrained_cfg`, also called `default_cfg`, and `feature_info` are what timm's data and feature tools read, and
    unlike timm's they follow the config: a model for 384 pixels says 384.
    """

    def __init__(self, config: ViTConfig, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.config = config
        self.grad_checkpointing = False
        self.distilled_training = False
        embed_dim = config.embed_dim
        layer_norm = partial(nn.LayerNorm, eps=config.norm_eps)

        self.patch_embed = PatchEmbed(
            config.img_size,
            config.patch_size,
            config.in_chans,
            embed_dim,
            bias=not config.pre_norm,
            strict_img_size=not config.dynamic_img_size,
            dynamic_img_pad=config.dynamic_img_pad,
            **dd,
        )
        # Tables first, modules after: the order of timm's state_dict.
        table_rows = self.patch_embed.num_patches + (0 if config.no_embed_class else config.num_prefix_tokens)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, embed_dim, **dd)) if config.reg_tokens else None
        table = None if config.rope_temperature else nn.Parameter(torch.empty(1, table_rows, embed_dim, **dd))
        self.pos_embed = table
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if config.distilled else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim, **dd)) if config.mask_token else None
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        dropout = PatchDropout(config.patch_drop_rate, config.num_prefix_tokens)
        self.patch_drop = dropout if config.patch_drop_rate else nn.Identity()
        self.norm_pre = layer_norm(embed_dim, **dd) if config.pre_norm else nn.Identity()
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
                    **dd,
                )
                for drop_path in drop_path_rates
            )
        )
        before, after = config.final_norm and not config.norm_after_pool, config.final_norm and config.norm_after_pool
        self.norm = layer_norm(embed_dim, **dd) if before else nn.Identity()
        self.attn_pool = None
        if config.global_pool == "map":
            how = {"num_heads": config.num_heads, "mlp_ratio": config.mlp_ratio, "norm_layer": layer_norm}
            how["act_layer"] = ACTIVATION_LAYERS[config.activation]
            self.attn_pool = AttentionPoolLatent(embed_dim, **how, **dd)
        self.fc_norm = layer_norm(embed_dim, **dd) if after else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self._new_heads()
        self.init_weights(needs_reset=False)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.feat_ratio()}
            for i in range(config.depth)
        ]
        self.pretrained_cfg = self.default_cfg = {
            "input_size": (config.in_chans, *config.img_size),
            "fixed_input_size": not config.dynamic_img_size,
            "interpolation": config.interpolation,
            "crop_pct": config.crop_pct,
            "crop_mode": config.crop_mode,
            "mean": config.mean,
            "std": config.std,
            "num_classes": config.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "head_dist") if config.distilled else "head",
        }

    def _new_heads(self) -> None:
        """Untrained classifiers as torch initialises a linear layer."""
        like = {"device": self._example.device, "dtype": self._example.dtype}
        for name in ("head", "head_dist") if self.config.distilled else ("head",):
            classes = self.config.num_classes
            head = nn.Linear(self.config.embed_dim, classes, **like) if classes else nn.Identity()
            setattr(self, name, head.train(self.training))

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """timm's default start: linear weights and positions normal with std 0.02, cut at 2; biases 0; tokens about 0;
        and with needs_reset all other layers by their own `reset_parameters`, as after `to_empty`."""
        if self.dist_token is not None:
            init_normal(self.dist_token)
        if self.pos_embed is not None:
            init_normal(self.pos_embed)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        self.apply(partial(_init_layer, needs_reset=needs_reset))

    # The width of what `forward_features` and `forward_head(pre_logits=True)` give, and timm's other two names of it.
    embed_dim = num_features = head_hidden_size = _from_config("embed_dim")
    in_chans = _from_config("in_chans")
    num_classes = _from_config("num_classes")
    global_pool = _from_config("global_pool")
    num_prefix_tokens = _from_config("num_prefix_tokens")
    num_reg_tokens = _from_config("reg_tokens")
    has_class_token = _from_config("class_token")
    no_embed_class = _from_config("no_embed_class")
    dynamic_img_size = _from_config("dynamic_img_size")
    pool_include_prefix = False

    def embed(self, x: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Images x (B, C, H, W) -> tokens (B, P + N, D) with positions, as the first block takes them.

        masks (B, N) bool: True where `mask_token` takes the patch's place, the position staying. In training patch
        dropout leaves fewer than N patches. All in one op where nobody can tell; else `patch_embed`, which may be any
        module from normalised images to tokens (B, N, D), is called as timm's is.
        """
        mean, std = self.config.mean, self.config.std
        if torch.jit.is_tracing() and x.dtype == torch.uint8 and not torch.onnx.is_in_onnx_export():
            x = x.bitwise_and(255)  # the graph will normalise what it gets: floats, which may be already, are refused
        positions, prefix = self._positions(x), self._prefix()
        if traced(x) or not can_fuse((self.patch_embed,), ((PatchEmbed,),)):
            tokens = self.patch_embed(normalise_pixels(x, self._example, mean, std))
            tokens = assemble_tokens(tokens, positions, prefix)
        else:
            if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8:
                mean = std = None
            tokens = self.patch_embed(x, positions, prefix, mean, std)
        if masks is not None:
            tokens = put_mask_tokens(tokens, masks, self.mask_token, positions, self.num_prefix_tokens)
        return _normalise(self.norm_pre, self.patch_drop(self.pos_drop(tokens)))

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """What timm's model does after `patch_embed`: patch tokens x (B, N, D) -> (B, P + N, D) with positions."""
        if self.dynamic_img_size:
            raise ValueError("_pos_embed cannot tell the grid from tokens, expected dynamic_img_size=False, or `embed`")
        table = None if self.pos_embed is None else self.pos_embed[0]
        return self.pos_drop(assemble_tokens(x, table, self._prefix()))

    def _prefix(self) -> torch.Tensor | None:
        """Class, distillation and register tokens (P, D), or None."""
        tokens = [token[0] for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0] if tokens else None

    @property
    def _example(self) -> torch.Tensor:
        """A parameter, which has the model's device and dtype."""
        return next(self.parameters()) if self.pos_embed is None else self.pos_embed

    def _positions(self, x: torch.Tensor) -> torch.Tensor | None:
        """The position table (N, D) or (P + N, D) for the image's grid; None for a model that has none."""
        config, table = self.config, self.pos_embed
        if table is not None and config.dynamic_img_size:
            how = (config.grid_size, config.patch_size, self._prefix_rows, config.pos_resampling)
            table = fit_positions(table, x, *how)
        return None if table is None else table[0]

    def _rope(self, x: torch.Tensor) -> Rope | None:
        """cos and sin for the patches of images x; None where blocks rotate nothing."""
        config = self.config
        if config.rope_temperature is None:
            return None
        head_dim = config.embed_dim // config.num_heads
        return rotary_of(x, config.patch_size, head_dim, config.rope_temperature, self._example)

    @property
    def _prefix_rows(self) -> int:
        """How many rows of the position table are for the prefix."""
        return 0 if self.config.no_embed_class or self.pos_embed is None else self.config.num_prefix_tokens

    def _embeds_alone(self) -> bool:
        """Whether nobody changes what `patch_embed` gives before the first block has it."""
        steps = (self.patch_embed, self.pos_drop, self.patch_drop, self.norm_pre)
        roles = ((PatchEmbed,), (nn.Dropout,), (PatchDropout, nn.Identity), (nn.Identity,))
        return type(self).embed is VisionTransformer.embed and can_fuse(steps, roles)

    def _run_block(self, block: nn.Module, x: torch.Tensor, attn_mask, is_causal, rope: Rope | None) -> torch.Tensor:
        how = {"attn_mask": attn_mask, "is_causal": is_causal} if attn_mask is not None or is_causal else {}
        if rope is not None:
            how["rope"] = rope
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **how)
        return block(x, **how)

    def forward_features(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images x (B, C, H, W) -> tokens (B, P + N, D), the prefix first, after `norm` where the model has it.

        attn_mask, broadcastable to (B, H, P + N, P + N), and is_causal: who attends to whom, as `nn.Attention` has
        them. masks (B, N) bool: patches that `mask_token` stands in for, as in DINOv2 and iBOT. Raises ValueError and
        TypeError as these say.
        """
        plain = attn_mask is None and not is_causal and not self.grad_checkpointing
        # What the embedding and each block know of their output spares the next one a pass over it, if nobody comes
        # between.
        alone = plain and not traced(x) and not torch.compiler.is_compiling()
        alone = alone and dispatch.may_fuse_blocks(self._example)
        roles = [(nn.Sequential,), *[(Block,)] * len(self.blocks)]
        alone = alone and can_fuse((self.blocks, *self.blocks), roles)
        rope = self._rope(x)
        with ops.carrying() if alone else contextlib.nullcontext():
            tokens = self.embed(x, masks)
            if alone and not self._embeds_alone():
                tokens = tokens.view_as(tokens)  # for which nothing was left
            if plain and rope is None:
                tokens = self.blocks(tokens)
            else:
                for block in self.blocks:
                    tokens = self._run_block(block, tokens, attn_mask, is_causal, rope)
        return _normalise(self.norm, tokens)

    def forward_head(
        self, x: torch.Tensor, pre_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Tokens x (B, P + N, D) of `forward_features` -> logits (B, num_classes), or with pre_logits, and where there
        is no classifier, the pooled features (B, D); for global_pool "" both are per token.

        A distilled model gives the mean over its two heads, or both apart, as a tuple, in training after
        `set_distilled_training()`.
        """
        if self.config.distilled:
            x, x_dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
            if pre_logits:
                return (x + x_dist) / 2
            x, x_dist = self.head(x), self.head_dist(x_dist)
            return (x, x_dist) if self.distilled_training and self.training else (x + x_dist) / 2
        x = self.head_drop(_normalise(self.fc_norm, self.pool(x)))
        return x if pre_logits else self.head(x)

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        """Tokens x (B, P + N, D) -> (B, D) by pool_type, the model's global_pool for None; x itself for ""."""
        pool = self.config.global_pool if pool_type is None else pool_type
        if pool not in POOLS:
            raise ValueError(f"pool_type is {pool!r}, expected one of {POOLS}")
        if (pool == "map") != (self.attn_pool is not None):
            raise ValueError(f"pool_type is {pool!r}, but the model was built for {self.config.global_pool!r}")
        if pool == "map":
            return self.attn_pool(x[:, self.num_prefix_tokens :])
        if pool == "token":
            return x[:, 0]
        if pool in AVERAGING_POOLS:
            patches = x[:, self.num_prefix_tokens :]
            if pool == "avg":
                return patches.mean(dim=1)
            return patches.amax(dim=1) if pool == "max" else 0.5 * (patches.amax(dim=1) + patches.mean(dim=1))
        return x

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images x (B, C, H, W) -> what `forward_head` gives; the masks as `forward_features` has them."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal, masks=masks))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> list | tuple[torch.Tensor, list] | dict:
        """Outputs of chosen blocks, in order: (forward_features' tokens, list), or the list with intermediates_only.

        indices: the last n blocks for an int, every block for None, else block numbers (negative from the end). Each
        item is the patch tokens, (B, D, rows, columns) for output_fmt "NCHW" or (B, N, D) for "NLC", and with
        return_prefix_tokens the tuple (patches, prefix (B, P, D)). norm: apply the final norm to each. stop_early: run
        no block after the last chosen one. output_dict: return a dict, the list as "image_intermediates", the prefixes
        as "image_intermediates_prefix", the tokens as "image_features". attn_mask and is_causal as `forward_features`
        has them. Raises ValueError for an index out of range, another output_fmt, and "NCHW" where patch dropout leaves
        no grid.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        reshape = output_fmt == "NCHW"
        if reshape and self.training and getattr(self.patch_drop, "prob", 0):
            raise ValueError("output_fmt is 'NCHW', but in training patch dropout leaves no grid; expected 'NLC'")
        chosen = block_indices(indices, len(self.blocks))
        last = max(chosen) if stop_early or intermediates_only else len(self.blocks) - 1
        tokens, rope = self.embed(x), self._rope(x)
        taken = []
        for index, block in enumerate(self.blocks[: last + 1]):
            tokens = self._run_block(block, tokens, attn_mask, is_causal, rope)
            if index in chosen:
                taken.append(_normalise(self.norm, tokens) if norm else tokens)

        intermediates = [y[:, self.num_prefix_tokens :] for y in taken]
        if reshape:
            rows_columns = self.patch_embed.dynamic_feat_size(x.shape[2:])
            intermediates = [y.transpose(1, 2).unflatten(2, rows_columns).contiguous() for y in intermediates]
        prefixes = []
        if return_prefix_tokens and self.num_prefix_tokens:
            prefixes = [y[:, : self.num_prefix_tokens] for y in taken]
        if output_dict:
            result = {"image_intermediates": intermediates}
            if prefixes:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": _normalise(self.norm, tokens)}
        if prefixes:
            intermediates = list(zip(intermediates, prefixes, strict=True))
        return intermediates if intermediates_only else (_normalise(self.norm, tokens), intermediates)

    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: torch.Tensor | None = None,
        *,
        return_class_token: bool = False,
    ) -> list:
        """Outputs of the last n blocks, or of the blocks numbered n: `forward_intermediates` under DINO's name.

        Items are (B, N, D), or (B, D, rows, columns) with reshape, or with return_prefix_tokens (patches, prefix), or
        with DINOv2's return_class_token (patches, class token (B, D)); norm is off by default, as in timm, but not in
        DINOv2. Raises ValueError for both at once, or where there is no class token.
        """
        if return_class_token and (return_prefix_tokens or not self.has_class_token):
            raise ValueError("return_class_token is True, expected a model with one and no return_prefix_tokens")
        layers = self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens or return_class_token,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )
        return [(patches, prefix[:, 0]) for patches, prefix in layers] if return_class_token else layers

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off what the outputs of the chosen blocks do not need, and return their numbers from 0.

        indices as in `forward_intermediates`. The blocks after the last one go, with prune_norm the final `norm`, with
        prune_head the pooling, the norm after it and the classifier.
        """
        chosen = block_indices(indices, len(self.blocks))
        self.blocks = self.blocks[: max(chosen) + 1]
        self.feature_info = self.feature_info[: len(self.blocks)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        normed = not (isinstance(self.norm, nn.Identity) and isinstance(self.fc_norm, nn.Identity))
        self.config = replace(self.config, depth=len(self.blocks), final_norm=normed)
        return chosen

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size from now on, and patches of another size; None leaves one as it is.

        The position table is resampled by the config's policy to the new grid, the patch projection as FlexiViT does.
        Both are new parameters where they change. Raises ValueError for a size that is none or that the patch does
        not divide.
        """
        old = self.config
        img_size = old.img_size if img_size is None else img_size
        self.config = replace(old, img_size=img_size, patch_size=old.patch_size if patch_size is None else patch_size)
        self.patch_embed.set_input_size(self.config.img_size, self.config.patch_size)
        if self.config.grid_size != old.grid_size and self.pos_embed is not None:
            table = resample_position_table(
                self.pos_embed.detach(), old.grid_size, self.config.grid_size, self._prefix_rows, old.pos_resampling
            )
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.pretrained_cfg["input_size"] = (self.in_chans, *self.config.img_size)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The classifier, or the pair (head, head_dist) of a distilled model."""
        return (self.head, self.head_dist) if self.config.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` outputs, 0 for none, and the pooling if one is given.

        The final norm stays where it is, and a distilled model has no pooling to change. Raises ValueError for an
        unknown pool or one that the model cannot have.
        """
        if global_pool is None or (self.config.distilled and global_pool == ""):
            global_pool = self.config.global_pool
        if global_pool == "map" and self.attn_pool is None:
            raise ValueError("global_pool is 'map', but the model was built without attention as its pool")
        self.config = replace(
            self.config, num_classes=num_classes, global_pool=global_pool, fc_norm=self.config.norm_after_pool
        )
        if global_pool != "map":
            self.attn_pool = None
        self.pretrained_cfg["num_classes"] = num_classes
        self._new_heads()

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the two heads' logits apart. Raises ValueError for a model that is not distilled."""
        if enable and not self.config.distilled:
            raise ValueError("set_distilled_training needs a distilled model, and this one is not")
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """In backward, recompute each block from its input instead of keeping its activations (arXiv 1604.06174).
        enable="fc1": no more than the first layer of each MLP, where a block runs as one op on the kernels; elsewhere
        all is kept. Of a ViT in bfloat16 that is 40 % less to keep for a ninth more of the products. Raises ValueError
        for another word."""
        if isinstance(enable, str) and enable != "fc1":
            raise ValueError(f'enable is {enable!r}, expected True, False or "fc1"')
        self.grad_checkpointing = bool(enable) and enable != "fc1"
        for module in self.blocks.modules():  # also where a block is wrapped, by torch.compile say
            if isinstance(module, Block):
                module.recompute_fc1 = enable == "fc1"

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that recipes leave out of weight decay, beside biases and norms."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that sort parameter names by depth, as timm's layer-wise learning-rate decay takes them."""
        return {
            "stem": r"^(?:cls_token|dist_token|reg_token|mask_token|pos_embed|patch_embed|norm_pre)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _init_layer(module: nn.Module, needs_reset: bool) -> None:
    if isinstance(module, nn.Linear):
        init_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (SwiGLU, AttentionPoolLatent)):  # `apply` comes here after their linear layers
        module.init_weights()
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _normalise(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not traced(x) and can_fuse((norm,), (LAYER_NORM,)) and norm_complete(norm):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)
