"""The two-way transformer of the mask decoder: tokens and image attend to each other."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = lambda name: nn.LayerNorm(epsilon=1e-5, name=name)  # torch's default; 1e-6 everywhere else in SAM


class Weights(nn.Module):
    """Kernel and bias of a linear layer, whose first `inputs` axes are summed over."""

    shape: tuple[int, ...]
    inputs: int = 1

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        axes = range(len(self.shape))
        init = nn.initializers.lecun_normal(in_axis=axes[: self.inputs], out_axis=axes[self.inputs :])
        kernel = self.param("kernel", init, self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[self.inputs :])


class Attention(nn.Module):
    """Attention with the inner width divided by `downsample`.

    Where one side is a few tokens and the other an image, the image's projections are multiplied into the tokens' side
    instead: the same by associativity, with half of the work.
    """

    heads: int
    downsample: int = 1

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """q: [p, t, C]; k, v: [p, s, C]; present: [p, s] bool, False for keys to pass by. Returns [p, t, C].

        A first axis of 1 stands for all p, and is projected once.
        """
        width, queries, keys = q.shape[-1], q.shape[1], k.shape[1]
        inner = width // self.downsample
        split = (width, self.heads, inner // self.heads)
        projections = [Weights(split, name=f"{name}_proj")() for name in "qkv"]
        projections.append(Weights((*split[1:], width), 2, name="out_proj")())
        if queries < keys and queries * self.heads < inner and len(k) > 1 and present is None:
            return few_queries(q, k, v, *projections)
        if keys < queries and keys * self.heads < inner and len(k) >= len(q):
            return few_keys(q, k, v, present, *projections)
        (wq, bq), (wk, bk), (wv, bv), (wo, bo) = projections
        project = lambda x, kernel, bias: jnp.einsum("psc,cnd->psnd", x, kernel) + bias
        q, k, v = project(q, wq, bq), project(k, wk, bk), project(v, wv, bv)
        scores = jnp.einsum("ptnd,psnd->ptns", q, k) * q.shape[-1] ** -0.5
        out = jnp.einsum("ptns,psnd->ptnd", softmax(scores, present, axis=-1), v)
        return jnp.einsum("ptnd,nde->pte", out, wo) + bo


def softmax(scores: jax.Array, present: jax.Array | None, axis: int) -> jax.Array:
    """Over the keys' axis of scores [p, ...]; `present` is [p, keys]."""
    if present is not None:
        shape = [present.shape[0]] + [1] * (scores.ndim - 1)
        shape[axis] = present.shape[1]
        scores = jnp.where(present.reshape(shape), scores, -jnp.inf)
    return jax.nn.softmax(scores, axis)


def few_queries(q, k, v, query, key, value, out):
    """Attention of tokens q to an image k, v; keys and values are never made."""
    (wq, bq), (wk, _), (wv, bv), (wo, bo) = query, key, value, out  # a keys' bias moves all scores of a query alike
    (p, t, width), heads = q.shape, wq.shape[1]
    q = (jnp.einsum("ptc,cnd->ptnd", q, wq) + bq) * wq.shape[-1] ** -0.5
    q = jnp.einsum("ptnd,cnd->ptnc", q, wk).reshape(p, t * heads, width)
    weights = jax.nn.softmax(jnp.einsum("pqc,psc->pqs", q, k), axis=-1)
    seen = jnp.einsum("pqs,psc->pqc", weights, v).reshape(p, t, heads, width)
    return jnp.einsum("ptnd,nde->pte", jnp.einsum("ptnc,cnd->ptnd", seen, wv) + bv, wo) + bo


def few_keys(q, k, v, present, query, key, value, out):
    """Attention of an image q to tokens k, v; queries and what is written back to them are never made."""
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = query, key, value, out
    (p, s, width), heads = k.shape, wq.shape[1]
    k = (jnp.einsum("psc,cnd->psnd", k, wk) + bk) * wq.shape[-1] ** -0.5
    v = jnp.einsum("psc,cnd->psnd", v, wv) + bv
    into = jnp.einsum("psnd,cnd->psnc", k, wq).reshape(p, s * heads, width)
    scores = jnp.einsum("pkc,ptc->pkt", into, q).reshape(p, s, heads, -1) + jnp.einsum("psnd,nd->psn", k, bq)[..., None]
    weights = softmax(scores, present, axis=1).reshape(p, s * heads, -1)
    back = jnp.einsum("psnd,nde->psne", v, wo).reshape(p, s * heads, width)
    return jnp.einsum("pkt,pke->pte", weights, back) + bo


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
