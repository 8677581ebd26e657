"""Attention with a bias that is given ready-made, or none, in memory that does not grow with the square of the image.

Shapes: b images or windows, t queries, s keys, n heads, d channels per head of q and k, e of v.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from slimsam_jax.models.relative_attention import at_least_float32, evenly, logits_at_once

Kept = tuple[jax.Array, ...]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Each token's mean of v, weighted by softmax(q k / sqrt(d) + bias), the softmax in float32 at least.

    At most `relative_attention.logits_at_once` logits exist at a time, and none is kept for the backward pass where
    that splits them. On a CPU this is also the faster way.

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


def by_chunks(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """A head at a time, and of it so many queries that few logits are needed. Arguments as `plain`.

    The images stay together: a loop over an axis that is split between devices would send all of it to all of them.
    """
    b, t, n, _ = q.shape
    size = evenly(t, logits_at_once() // (b * k.shape[1]))
    chunks = math.ceil(t / size)
    spare = chunks * size - t  # queries of zeros fill the last chunk up
    q = jnp.pad(q, ((0, 0), (0, spare), (0, 0), (0, 0))).reshape(b, chunks, size, n, -1)
    bias = jnp.broadcast_to(bias, (n, t, bias.shape[2]))
    bias = jnp.pad(bias, ((0, 0), (0, spare), (0, 0))).reshape(n, chunks, size, -1)

    def of_head(head: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, bias = head
        return jax.lax.map(lambda some: attend_head(some[0], k, v, some[1]), (q, bias))

    heads = (q.transpose(3, 1, 0, 2, 4), *(jnp.moveaxis(x, 2, 0) for x in (k, v)), bias)
    out = jax.lax.map(of_head, heads)  # [n, chunks, b, size, e]
    return out.transpose(2, 1, 3, 0, 4).reshape(b, chunks * size, n, -1)[:, :t]


# JAX's own gradient would keep all weights, or make the whole forward pass once more and differentiate that.
@jax.custom_vjp
def attend_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Of one head: q [b, t, d], k [b, s, d], v [b, s, e], bias [t or 1, s or 1] -> [b, t, e].

    For the backward pass each query keeps its output and the logarithm of its sum, as in flash attention (Dao et al.,
    2022), and the logits are computed anew. (XLA may merge that with the forward pass, but not across loops.)
    """
    return _forward(q, k, v, bias)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> tuple[jax.Array, Kept]:
    logits = _product("btd,bsd->bts", q * q.shape[-1] ** -0.5, k) + bias
    # Subtracted from all, the largest has no gradient: for JAX's own, where a tracer has inlined this.
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    # Divided after the product with v: a pass over the logits less than jax.nn.softmax.
    out = (_product("bts,bse->bte", weights.astype(v.dtype), v) / total).astype(v.dtype)
    return out, (q, k, v, bias, out, largest + jnp.log(total))


def _backward(kept: Kept, gradient: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, bias, out, log_total = kept
    scaled = q * q.shape[-1] ** -0.5
    weights = jnp.exp(_product("btd,bsd->bts", scaled, k) + bias - log_total)
    mean = (gradient * out.astype(weights.dtype)).sum(-1, keepdims=True)
    of_logits = weights * (_product("bte,bse->bts", gradient, v) - mean)
    broadcast = tuple(axis for axis in (1, 2) if bias.shape[axis - 1] == 1)
    of_bias = of_logits.sum((0, *broadcast)).reshape(bias.shape)
    of_logits = of_logits.astype(k.dtype)
    of_q = _product("bts,bsd->btd", of_logits, k) * q.shape[-1] ** -0.5
    of_k, of_v = _over_queries(scaled, of_logits), _over_queries(gradient, weights.astype(v.dtype))
    gradients = (of_q, of_k, of_v, of_bias)
    return tuple(x.astype(like.dtype) for x, like in zip(gradients, (q, k, v, bias), strict=True))


def _product(axes: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """Adds up in float32 at least."""
    return jnp.einsum(axes, one, other, preferred_element_type=at_least_float32(one))


def _over_queries(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[b, t, c], [b, t, s] -> [b, s, c].

    On a CPU the narrow array transposed times the wide one takes half as long as the wide one transposed times the
    narrow; the barrier keeps XLA from making the one the other.
    """
    narrow = jax.lax.optimization_barrier(x.swapaxes(1, 2))
    return _product("bct,bts->bcs", narrow, weights).swapaxes(1, 2)


attend_head.defvjp(_forward, _backward)
