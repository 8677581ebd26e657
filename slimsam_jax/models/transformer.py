"""The two-way transformer of the mask decoder: tokens and image attend to each other."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = lambda name: nn.LayerNorm(epsilon=1e-5, name=name)  # torch's default; 1e-6 everywhere else in SAM


class Attention(nn.Module):
    """Attention with the inner width divided by `downsample`."""

    heads: int
    downsample: int = 1

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """q: [p, t, C]; k, v: [p, s, C]; present: [p, s] bool, False for keys to pass by. Returns [p, t, C].

        A first axis of 1 stands for all p, and is projected once.
        """
        width = q.shape[-1]
        head_dim = width // self.downsample // self.heads
        project = lambda name: nn.DenseGeneral((self.heads, head_dim), name=name)
        q, k, v = project("q_proj")(q), project("k_proj")(k), project("v_proj")(v)
        scores = jnp.einsum("ptnd,psnd->pnts", q, k) * head_dim**-0.5
        if present is not None:
            scores = jnp.where(present[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("pnts,psnd->ptnd", weights, v)
        return nn.DenseGeneral(width, axis=(-2, -1), name="out_proj")(out)


class TwoWayAttentionBlock(nn.Module):
    """Tokens among themselves, tokens to image, MLP on tokens, image to tokens."""

    heads: int
    mlp_dim: int
    first: bool

    @nn.compact
    def __call__(self, tokens, image, token_pe, image_pe, present=None):
        """tokens, token_pe: [p, t, C]; image, image_pe: [p or 1, h*w, C]; present: [p, t]. Returns tokens, image."""
        width = tokens.shape[-1]
        q = tokens if self.first else tokens + token_pe
        attended = Attention(self.heads, name="self_attn")(q, q, tokens, present)
        # The first block replaces the tokens (they have no position yet), later ones add to them.
        tokens = Norm("norm1")(attended if self.first else tokens + attended)
        cross = Attention(self.heads, 2, name="cross_attn_token_to_image")
        tokens = Norm("norm2")(tokens + cross(tokens + token_pe, image + image_pe, image))
        hidden = jax.nn.relu(nn.Dense(self.mlp_dim, name="mlp_lin1")(tokens))
        tokens = Norm("norm3")(tokens + nn.Dense(width, name="mlp_lin2")(hidden))
        cross = Attention(self.heads, 2, name="cross_attn_image_to_token")
        image = Norm("norm4")(image + cross(image + image_pe, tokens + token_pe, tokens, present))
        return tokens, image


class TwoWayTransformer(nn.Module):
    depth: int
    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, image, image_pe, tokens, present=None):
        """image, image_pe: [p or 1, h*w, C]; tokens: [p, t, C]; present: [p, t] bool. Returns tokens, image."""
        token_pe = tokens
        for i in range(self.depth):
            block = TwoWayAttentionBlock(self.heads, self.mlp_dim, first=i == 0, name=f"layers_{i}")
            tokens, image = block(tokens, image, token_pe, image_pe, present)
        final = Attention(self.heads, 2, name="final_attn_token_to_image")
        tokens = tokens + final(tokens + token_pe, image + image_pe, image)
        return Norm("norm_final_attn")(tokens), image
