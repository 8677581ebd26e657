"""Attention with a bias that is given ready-made, or none, in memory that does not grow with the square of the image.

Shapes: b images or windows, t queries, s keys, n heads, d channels per head of q and k, e of v.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from slimsam_jax.models.relative_attention import at_least_float32, evenly, logits_at_once


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Each token's mean of v, weighted by softmax(q k / sqrt(d) + bias), the softmax in float32 at least.

    At most `models.attention.logits_at_once` logits exist at a time, and none is kept for the backward pass where that
    splits them. On a CPU this is also the faster way: at 4096 tokens and 3 heads of 64 channels a third of the CPU
    seconds of all logits at once.

    Args:
      q: [b, t, n, d].
      k: [b, s, n, d].
      v: [b, s, n, e].
      bias: [n, t, s], added to the logits of every image or window; None for none.

    Returns:
      [b, t, n, e].
    """
    (b, t, n, _), s = q.shape, k.shape[1]
    if bias is None:
        bias = jnp.zeros((n, 1, 1), q.dtype)
    compute = plain if b * n * t * s <= logits_at_once() else by_chunks
    return compute(q, k, v, bias)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """All at once; bias [n, t or 1, s or 1]."""
    return jax.vmap(attend_head, in_axes=(2, 2, 2, 0), out_axes=2)(q, k, v, bias)


def attend_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Of one head: q [b, t, d], k [b, s, d], v [b, s, e], bias [t or 1, s or 1] -> [b, t, e]."""
    wide = at_least_float32(q)
    logits = jnp.einsum("btd,bsd->bts", q * q.shape[-1] ** -0.5, k, preferred_element_type=wide) + bias
    # Divided after the product with v: a pass over the logits less than jax.nn.softmax. The largest is subtracted from
    # all, so it has no gradient.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("bts,bse->bte", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)


def by_chunks(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """A head at a time, and of it so many queries that few logits are needed. Arguments as `plain`.

    The images stay together: a loop over an axis that is split between devices would send all of it to all of them.
    """
    b, t, n, _ = q.shape
    chunk = evenly(t, logits_at_once() // (b * k.shape[1]))
    bias = jnp.broadcast_to(bias, (n, t, bias.shape[2]))

    def of_head(head: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, bias = head

        def one_query(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            query, row = inputs
            return attend_head(query[:, None], k, v, row[None])[:, 0]

        # The loop keeps the backward pass from merging the second computation with the first.
        compute = jax.checkpoint(one_query, prevent_cse=False)
        return jax.lax.map(compute, (jnp.moveaxis(q, 1, 0), bias), batch_size=chunk)

    heads = (*(jnp.moveaxis(x, 2, 0) for x in (q, k, v)), bias)
    return jax.lax.map(of_head, heads).transpose(2, 1, 0, 3)  # [n, t, b, e] before
