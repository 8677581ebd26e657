"""The mask decoder of SAM: embedding, tokens -> masks, predicted IoU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.models.config import Config
from slimsam_jax.models.transformer import TwoWayTransformer


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"layers_{i}")(x if i == 0 else jax.nn.relu(x))
        return x


class Doubling(nn.Module):
    """A transposed convolution, 2 x 2 with stride 2, in PyTorch's definition: every position becomes four, alone."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., 2, 2, features]."""
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, (2, 2, self.features, x.shape[-1]))
        return jnp.einsum("...c,ijdc->...ijd", x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


class MaskDecoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, embedding, image_pe, sparse, dense, present=None):
        """Predicts all masks of p prompts.

        Args:
          embedding: [h, w, C] embedding of the one image, or [p, h, w, C] of each prompt's.
          image_pe: [h, w, C] from `PromptEncoder.dense_positions`.
          sparse, dense: from `PromptEncoder`.
          present: [p, n] bool, False for tokens of `sparse` that fill up and shall change nothing; None for all.

        Returns:
          masks: [p, 1 + multimask_outputs, 4h, 4w] logits; index 0 is the single-mask output.
          iou: [p, 1 + multimask_outputs], the model's own estimate.
        """
        c, normal = self.config, nn.initializers.normal(1.0)
        outputs, width = 1 + c.multimask_outputs, c.out_chans
        iou_token = self.param("iou_token", normal, (1, width))
        mask_tokens = self.param("mask_tokens", normal, (outputs, width))
        prompts, (h, w) = sparse.shape[0], c.grid

        learnt = jnp.concatenate([iou_token, mask_tokens])
        tokens = jnp.concatenate([jnp.tile(learnt[None], (prompts, 1, 1)), sparse], axis=1)
        if present is not None:
            present = jnp.concatenate([jnp.ones((prompts, 1 + outputs), bool), present], axis=1)
        image = (embedding + dense).reshape(-1, h * w, width)  # once, until the first tokens attend to it
        transformer = TwoWayTransformer(c.decoder_depth, c.decoder_heads, c.decoder_mlp_dim, name="transformer")
        tokens, image = transformer(image, image_pe.reshape(1, h * w, width), tokens, present)
        self.sow("intermediates", "tokens", tokens[:, : 1 + outputs])  # for `sam_head.decode_tokens`

        hyper = [
            MLP((width, width, width // 8), name=f"output_hypernetworks_mlps_{i}")(tokens[:, 1 + i])
            for i in range(outputs)
        ]
        pixels = self.upscale(image).reshape(prompts, -1, width // 8)
        masks = jnp.einsum("pmc,pnc->pmn", jnp.stack(hyper, axis=1), pixels)
        # The axes of one position, which has become 4 x 4, in their order only now that they have no channels.
        masks = masks.reshape(prompts, outputs, h, w, 2, 2, 2, 2).transpose(0, 1, 2, 4, 6, 3, 5, 7)
        masks = masks.reshape(prompts, outputs, 4 * h, 4 * w)
        iou = MLP((c.iou_head_dim, c.iou_head_dim, outputs), name="iou_prediction_head")(tokens[:, 0])
        return masks, iou

    def upscale(self, x: jax.Array) -> jax.Array:
        """[p, h*w, C] -> [p, h*w, 2, 2, 2, 2, C/8], rows and columns of either doubling."""
        width = x.shape[-1]
        gelu = lambda x: jax.nn.gelu(x, approximate=False)
        x = Doubling(width // 4, name="output_upscaling_0")(x)
        norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="output_upscaling_1")  # of few channels
        x = gelu(norm(x))
        return gelu(Doubling(width // 8, name="output_upscaling_3")(x))
