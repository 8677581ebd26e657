"""The prompt encoder of SAM: points, boxes, masks -> tokens."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.imaging.prompts import IGNORED, NOT_A_POINT
from slimsam_jax.models.config import Config


class PromptEncoder(nn.Module):
    """Points and box corners become sparse tokens, a mask a dense embedding added to the image's."""

    config: Config

    def setup(self):
        c, normal = self.config, nn.initializers.normal(1.0)
        # Frequencies of the random Fourier features: a buffer in PyTorch, never trained there nor here.
        self.positional_encoding = self.param("positional_encoding_gaussian_matrix", normal, (2, c.out_chans // 2))
        self.point_embeddings = [self.param(f"point_embeddings_{i}", normal, (1, c.out_chans)) for i in range(4)]
        self.not_a_point_embed = self.param("not_a_point_embed", normal, (1, c.out_chans))
        self.no_mask_embed = self.param("no_mask_embed", normal, (1, c.out_chans))
        conv = lambda features, size: nn.Conv(features, (size, size), strides=(size, size), padding="VALID")
        self.mask_downscaling_0 = conv(c.mask_in_chans // 4, 2)
        # Of few channels the mean of squares less the square of the mean is too rough a variance.
        norm = lambda: nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
        self.mask_downscaling_1 = norm()
        self.mask_downscaling_3 = conv(c.mask_in_chans, 2)
        self.mask_downscaling_4 = norm()
        self.mask_downscaling_6 = conv(c.out_chans, 1)

    def __call__(self, points: jax.Array, labels: jax.Array, masks: jax.Array | None = None, masked=None):
        """Encodes p prompts of n points each.

        Args:
          points: [p, n, 2] (x, y) in pixels of the model frame; box corners are points too
            (see `prompt_points`), n may be 0.
          labels: [p, n] int: -3 ignored, -2 absent, -1 not a point, 0 background, 1 foreground, 2 and 3 the
            top-left and bottom-right corner of a box.
          masks: [p, 4h, 4w, 1] logits of a previous mask, or None.
          masked: [p] bool, which prompts `masks` counts for; None for all.

        Returns:
          sparse: [p, n, C] tokens; dense: [p, h, w, C] ([1, 1, 1, C] without a mask).
        """
        return self.sparse(points, labels), self.dense(masks, masked)

    def sparse(self, points: jax.Array, labels: jax.Array) -> jax.Array:
        height, width = self.config.image_size
        encoded = self.encode_positions((points + 0.5) / jnp.array([width, height], jnp.float32))
        real = (labels != NOT_A_POINT)[..., None]
        kind = jnp.concatenate(self.point_embeddings)[jnp.clip(labels, 0, 3)]
        tokens = jnp.where(real, encoded + kind, self.not_a_point_embed)
        return jnp.where((labels != IGNORED)[..., None], tokens, 0.0)

    def dense(self, masks: jax.Array | None, masked: jax.Array | None = None) -> jax.Array:
        without = self.no_mask_embed[:, None, None, :]
        if masks is None:
            return without
        gelu = lambda x: jax.nn.gelu(x, approximate=False)
        x = gelu(self.mask_downscaling_1(self.mask_downscaling_0(masks)))
        x = gelu(self.mask_downscaling_4(self.mask_downscaling_3(x)))
        x = self.mask_downscaling_6(x)
        return x if masked is None else jnp.where(masked[:, None, None, None], x, without)

    def encode_positions(self, coordinates: jax.Array) -> jax.Array:
        """Random Fourier features of (x, y) in 0..1: [..., 2] -> [..., C]."""
        phase = 2 * jnp.pi * ((2 * coordinates - 1) @ self.positional_encoding)
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)

    def dense_positions(self) -> jax.Array:
        """Encoding of the centres of the embedding's cells: [h, w, C]."""
        h, w = self.config.grid
        y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
        return self.encode_positions(jnp.stack([x, y], axis=-1))
