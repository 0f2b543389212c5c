from fastvit.reference.ops import attention, layer_norm, layer_norm_linear, layer_norm_mlp, linear_residual, patch_embed
