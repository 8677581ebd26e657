"""The ViT image encoder of SAM: images -> embedding, features.

Shapes: b images, h x w tokens, D embedding channels, n heads, d channels per head,
M MLP channels. Names follow `segment_anything`, with q, k and v apart as in SlimSAM.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.models.attention import Form, at_least_float32, attend
from slimsam_jax.models.config import GLOBAL, Block, Config

Features = dict[str, dict[str, jax.Array]]


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions (ViTDet)."""

    block: Block
    span: tuple[int, int]
    dtype: Any = jnp.float32
    form: Form = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, D] with (h, w) == span. Returns the same shape, and q, k, v, heads: [b, h, w, n, d]."""
        head_dim = self.block.head_dim
        project = lambda name: nn.DenseGeneral((self.block.heads, head_dim), dtype=self.dtype, name=name)
        q, k, v = (project(name)(x) for name in "qkv")
        q = self.perturb("queries", q)
        tables = (
            self.param(f"rel_pos_{axis}", nn.initializers.zeros, (2 * side - 1, head_dim)).astype(self.dtype)
            for axis, side in zip("hw", self.span, strict=True)
        )
        heads = attend(q, k, v, *tables, self.form)
        out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="proj")(heads)
        return out, {"q": q, "k": k, "v": v, "heads": heads}


def window_partition(x: jax.Array, window: int) -> jax.Array:
    """[b, h, w, c] -> [b * windows, window, window, c], zero-padded at the bottom and right."""
    b, h, w, c = x.shape
    rows, columns = -(-h // window), -(-w // window)
    x = jnp.pad(x, ((0, 0), (0, rows * window - h), (0, columns * window - w), (0, 0)))
    x = x.reshape(b, rows, window, columns, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b * rows * columns, window, window, c)


def window_unpartition(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Inverse of `window_partition`; drops the padding."""
    window, c = x.shape[1], x.shape[-1]
    rows, columns = (-(-side // window) for side in grid)
    x = x.reshape(-1, rows, columns, window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * window, columns * window, c)[:, : grid[0], : grid[1]]


class EncoderBlock(nn.Module):
    """norm1, attention, residual; norm2, MLP, residual."""

    block: Block
    span: tuple[int, int]
    dtype: Any = jnp.float32
    attention: Form = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, D]. Returns the same shape and the block's features (see `ImageEncoder`)."""
        norm = lambda name: nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)
        attention = Attention(self.block, self.span, self.dtype, self.attention, name="attn")
        y = norm("norm1")(x)
        if self.block.window == GLOBAL:
            y, features = attention(y)
        else:
            # Padded after the norm: pad tokens are zero, yet take part with q, k, v equal to the biases.
            y, features = attention(window_partition(y, self.block.window))
            y = window_unpartition(y, x.shape[1:3])
        middle = self.perturb("middle", x + y)
        y = nn.Dense(self.block.mlp_dim, dtype=self.dtype, name="mlp_lin1")(norm("norm2")(middle))
        hidden = jax.nn.gelu(y, approximate=False)
        out = self.perturb("out", middle + nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_lin2")(hidden))
        return out, {**features, "mlp": hidden, "middle": middle, "out": out}


class ImageEncoder(nn.Module):
    """images -> (embedding, features).

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters stay float32.
      remat: recompute each block in the backward pass instead of storing it.
      attention: how it is computed (`attention.attend`).
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False
    attention: Form = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Features]:
        """Encodes normalised images.

        Args:
          images: [b, H, W, 3], normalised and padded by `sam.preprocess`.

        Returns:
          embedding: [b, h, w, out_chans] float32, (h, w) = config.grid.
          features: {"patch": {"out": [b, h, w, D]}} and, under "blocks_i", those of each block:
            q, k, v [b * windows, rows, columns, n, d], before the 1/sqrt(d) scale, padded window
              tokens included;
            heads, of the same shape: what each head gives to proj;
            middle, out [b, h, w, D]: the residual stream after attention and after the MLP;
            mlp [b, h, w, M]: the hidden layer, after GELU.
            Under `jit` those that nobody reads cost nothing.

        Flax's collection "perturbations" adds to the residual stream after the attention ("middle") and the MLP
        ("out") of each block, and to its q ("attn/queries"), so that gradients can be taken there.
        """
        c = self.config
        conv = lambda features, size, name, **kw: nn.Conv(features, (size, size), dtype=self.dtype, name=name, **kw)
        patch = c.patch_size
        x = conv(c.embed_dim, patch, "patch_embed_proj", strides=(patch, patch), padding="VALID")(images)
        x = x + self.param("pos_embed", nn.initializers.zeros, (1, *c.grid, c.embed_dim)).astype(self.dtype)
        features = {"patch": {"out": x}}
        make_block = nn.remat(EncoderBlock) if self.remat else EncoderBlock
        for i, block in enumerate(c.blocks):
            name = f"blocks_{i}"
            x, features[name] = make_block(block, c.attention_span(block), self.dtype, self.attention, name=name)(x)
        for i, size in ((0, 1), (2, 3)):
            x = conv(c.out_chans, size, f"neck_{i}", padding="SAME", use_bias=False)(x)
            x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"neck_{i + 1}")(x)
        return x.astype(at_least_float32(x)), features
