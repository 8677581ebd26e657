"""EfficientSAM's two-way transformer: SAM's attention in other blocks."""

from __future__ import annotations

import flax.linen as nn

from slimsam_jax.models.encoders.layers import gelu
from slimsam_jax.models.transformer import Attention, Norm


class TwoWayAttentionBlock(nn.Module):
    """Tokens among themselves, tokens to image, MLP on tokens, image to tokens.

    Unlike SAM's, the first block adds its self-attention to the tokens instead of replacing them, later ones add the
    positions to the tokens for good, so that values see them too, and the MLP has GELU.
    """

    heads: int
    mlp_dim: int
    first: bool

    @nn.compact
    def __call__(self, tokens, image, token_pe, image_pe):
        """tokens, token_pe: [p, t, C]; image, image_pe: [p or 1, h*w, C]. Returns tokens, image."""
        tokens = tokens if self.first else tokens + token_pe
        tokens = Norm("norm1")(tokens + Attention(self.heads, name="self_attn")(tokens, tokens, tokens))
        cross = Attention(self.heads, 2, name="cross_attn_token_to_image")
        tokens = Norm("norm2")(tokens + cross(tokens + token_pe, image + image_pe, image))
        hidden = gelu(nn.Dense(self.mlp_dim, name="mlp_lin1")(tokens))
        tokens = Norm("norm3")(tokens + nn.Dense(tokens.shape[-1], name="mlp_lin2")(hidden))
        cross = Attention(self.heads, 2, name="cross_attn_image_to_token")
        image = Norm("norm4")(image + cross(image + image_pe, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    depth: int
    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, image, image_pe, tokens):
        """image, image_pe: [p or 1, h*w, C]; tokens: [p, t, C]. Returns tokens, image, and the tokens of each block."""
        token_pe, between = tokens, []
        for i in range(self.depth):
            block = TwoWayAttentionBlock(self.heads, self.mlp_dim, first=i == 0, name=f"layers_{i}")
            tokens, image = block(tokens, image, token_pe, image_pe)
            between.append(tokens)
        final = Attention(self.heads, 2, name="final_attn_token_to_image")
        tokens = tokens + final(tokens + token_pe, image + image_pe, image)
        return Norm("norm_final_attn")(tokens), image, between
