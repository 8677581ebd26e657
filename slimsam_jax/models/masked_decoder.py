"""The decoder of masked pre-training: tokens of the patches that were seen -> features of all (EfficientSAM's SAMI).

Used while an encoder learns, and in no SAM. Shapes: b images, k patches seen of h * w, D channels of the encoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.models.encoders.layers import gelu
from slimsam_jax.models.transformer import Attention


class MaskedDecoder(nn.Module):
    """Queries for what was not seen attend to what was; both go through one linear head.

    Attributes:
      patches: h * w.
      out_chans: channels of the features to predict.
      width, depth, heads: of its blocks.
    """

    patches: int
    out_chans: int
    width: int = 512
    depth: int = 8
    heads: int = 16

    @nn.compact
    def __call__(self, tokens: jax.Array, order: jax.Array) -> jax.Array:
        """Predicts features of all patches.

        Args:
          tokens: [b, k, D], the encoder's of the patches seen.
          order: [b, h * w] indices of all patches, those seen first, in the order of `tokens`.

        Returns:
          [b, h * w, out_chans] float32, in the image's order.
        """
        count, normal = tokens.shape[1], nn.initializers.normal(0.02)
        positions = self.param("positions", normal, (self.patches, self.width))[order]
        seen = nn.Dense(self.width, name="embed")(tokens.astype(jnp.float32))
        norm = lambda name: nn.LayerNorm(epsilon=1e-6, name=name)
        memory = norm("norm_memory")(seen + positions[:, :count])
        x = self.param("mask_token", normal, (1, self.width)) + positions[:, count:]
        for i in range(self.depth):
            x = x + Attention(self.heads, name=f"cross_{i}")(norm(f"norm1_{i}")(x), memory, memory)
            hidden = gelu(nn.Dense(4 * self.width, name=f"mlp_lin1_{i}")(norm(f"norm2_{i}")(x)))
            x = x + nn.Dense(self.width, name=f"mlp_lin2_{i}")(hidden)
        together = norm("norm")(jnp.concatenate([seen, x], axis=1))
        whole = jnp.take_along_axis(together, jnp.argsort(order, axis=1)[..., None], axis=1)
        return nn.Dense(self.out_chans, name="head")(whole)
