"""Attention with decomposed relative positions (ViTDet): one function, three ways to compute it.

softmax(q k / sqrt(d) + q Rh + q Rw) v over the h x w tokens of an image or a window, where Rh and Rw depend on the
distance of two tokens in rows and in columns, and q is taken before scaling: pruning a channel of q and k therefore
prunes the same channel of the two tables. The softmax is in float32 at least.

At 64 x 64 tokens the logits of one ViT-B block are 0.8 GB in float32, and their gradients as much again. The forms:

- "plain": all logits at once, kept for the backward pass.
- "rows": a few rows of a few heads at a time, computed again in the backward pass.
- "folded": the positions as further channels, q' = [q / sqrt(d), q Rh, q Rw], k' = [k, one-hot row, one-hot column].
  Then q' k' are the logits, and a kernel that knows no bias will do: flash attention, of cuDNN on a GPU and of JAX's
  Pallas kernel on a TPU (`flash_attention`).

Shapes: b images or windows, h x w tokens, n heads, d channels per head.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slimsam_jax import sharding
from slimsam_jax.errors import InputError
from slimsam_jax.models import flash_attention

Form = Literal["auto", "plain", "rows", "folded"]

# Logits that "rows" computes at once, by backend. On a CPU they should stay in the cache: measured in
# experiments/README.md. On accelerators, not measured yet, they should fill the device: 0.27 GB in float32.
LOGITS_AT_ONCE = {"cpu": 2**20}
LOGITS_AT_ONCE_ELSEWHERE = 2**26


def logits_at_once() -> int:
    """Returns how many logits one device computes at once."""
    return LOGITS_AT_ONCE.get(sharding.platform(), LOGITS_AT_ONCE_ELSEWHERE)


def at_least_float32(x: jax.Array) -> Any:
    """The dtype for what half precision would spoil."""
    return jnp.promote_types(x.dtype, jnp.float32)


def attend(
    q, k, v, rel_pos_h: jax.Array, rel_pos_w: jax.Array, form: Form = "auto", mesh: Mesh | None = None
) -> jax.Array:
    """Each token's mean of v, weighted by softmax(q k / sqrt(d) + q Rh + q Rw).

    Args:
      q, k, v: [b, h, w, n, d], of one dtype.
      rel_pos_h, rel_pos_w: [2h-1, d], [2w-1, d]; row h-1 is distance zero.
      form: how. "auto" is "folded" where there is a kernel of flash attention for it; elsewhere it bounds memory:
        "plain" where few logits are needed, else "rows". On a CPU that is also what measured best
        (experiments/README.md); of accelerators the compilers' numbers are in docs/planning.md.
      mesh: of the devices that the b images are split over; None for one device.

    Returns:
      [b, h, w, n, d].

    Raises:
      InputError: there is no such form, or this device cannot run it.
    """
    h, w = q.shape[1:3]
    split = {"rows": by_rows, "folded": folded}
    forms = {"plain": plain, **{name: functools.partial(function, mesh=mesh) for name, function in split.items()}}
    compute = forms[choose(form, q, mesh)]
    return compute(q, k, v, by_distance(rel_pos_h, h), by_distance(rel_pos_w, w))


def choose(form: Form, q: jax.Array, mesh: Mesh | None = None) -> str:
    """The form that "auto" stands for; any other is itself, if the devices can run it."""
    if form not in get_args(Form):
        raise InputError(f"attention {form!r} is none of {', '.join(get_args(Form))}")
    obstacle = no_flash(q, mesh)
    if form == "folded" and obstacle:
        raise InputError(f"attention folded cannot run on this {sharding.platform().upper()}: {obstacle}; use auto")
    if form != "auto":
        return form
    if sharding.platform() != "cpu" and not obstacle:
        return "folded"
    b, h, w, n, _ = q.shape
    return "plain" if b * n * (h * w) ** 2 <= logits_at_once() * _shares(b, mesh) else "rows"


def _shares(images: int, mesh: Mesh | None) -> int:
    """Into how many shares so many images are split, over the devices of a mesh; 1 where the caller names none."""
    return 1 if mesh is None or images % mesh.size else mesh.size


def no_flash(q: jax.Array, mesh: Mesh | None = None) -> str:
    """Why flash attention cannot take `q` folded, window or image; "" if it can."""
    b, h, w, _, d = q.shape
    return flash_attention.obstacle(folded_width(h, w, d), q.dtype, b, mesh)


def by_distance(rel_pos: jax.Array, side: int) -> jax.Array:
    """[2*side-1, d] by distance -> [side, side, d] by query and key."""
    position = jnp.arange(side)
    return rel_pos[position[:, None] - position + side - 1]


def attend_row(q, table_h, table_w, k, v) -> jax.Array:
    """For the queries of one row of one head: q [w, d], its table_h [h, d], table_w [w, w, d]; k, v [h, w, d]."""
    wide = at_least_float32(q)
    logits = jnp.einsum("wd,yxd->wyx", q * q.shape[-1] ** -0.5, k, preferred_element_type=wide)
    logits += jnp.einsum("wd,yd->wy", q, table_h)[:, :, None] + jnp.einsum("wd,wxd->wx", q, table_w)[:, None, :]
    # Divided after the product with v: a pass over the logits less than jax.nn.softmax. The largest is subtracted from
    # all, so it has no gradient.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max((1, 2), keepdims=True)))
    out = jnp.einsum("wyx,yxd->wd", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (out / weights.sum((1, 2))[:, None]).astype(v.dtype)


def plain(q, k, v, table_h, table_w) -> jax.Array:
    """All at once. As `attend`, with tables [h, h, d], [w, w, d] by query and key."""
    rows = jax.vmap(attend_row, in_axes=(0, 0, None, None, None))
    heads = jax.vmap(rows, in_axes=(2, None, None, 2, 2), out_axes=2)
    return jax.vmap(heads, in_axes=(0, None, None, 0, 0))(q, table_h, table_w, k, v)


def by_rows(q, k, v, table_h, table_w, mesh: Mesh | None = None) -> jax.Array:
    """At most `logits_at_once` a device: some rows of one head, or all rows of some heads. Arguments as `plain`."""
    b, h, w, n, d = q.shape
    # A loop over an axis that is split between devices would send all of it to all of them, so with several devices
    # images and windows stay together.
    steps, each = (n * b, 1) if sharding.device_count() == 1 else (n, b)
    queries = logits_at_once() * _shares(each, mesh) // (each * h * w)
    rows, heads = evenly(h, queries // w), evenly(steps, queries // (h * w))
    attend_rows = jax.vmap(attend_row, in_axes=(0, None, None, 0, 0))

    def attend_head(qkv: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = qkv
        # The loop keeps the backward pass from merging the second computation with the first.
        one_row = jax.checkpoint(lambda row: attend_rows(*row, table_w, k, v), prevent_cse=False)
        return jax.lax.map(one_row, (jnp.moveaxis(q, 1, 0), table_h), batch_size=rows)

    by_head = tuple(jnp.moveaxis(x, 3, 0).reshape(steps, each, h, w, d) for x in (q, k, v))
    out = jax.lax.map(attend_head, by_head, batch_size=heads)  # [steps, h, each, w, d]
    return jnp.moveaxis(out, 1, 2).reshape(n, b, h, w, d).transpose(1, 2, 3, 0, 4)


def evenly(total: int, most: int) -> int:
    """The size of equal chunks of at most `most` (at least 1); the last may be smaller."""
    chunks = math.ceil(total / max(most, 1))
    return math.ceil(total / chunks)


def folded_width(h: int, w: int, d: int) -> int:
    """Channels per head with the positions folded in: a multiple of 8, as cuDNN wants it."""
    return math.ceil((d + h + w) / 8) * 8


def folded(q, k, v, table_h, table_w, mesh: Mesh | None = None) -> jax.Array:
    """By attention without a bias. Arguments as `plain`; zero padding changes nothing."""
    b, h, w, n, d = q.shape
    bias_h = jnp.einsum("brwnd,ryd->brwny", q, table_h)
    bias_w = jnp.einsum("brwnd,wxd->brwnx", q, table_w)
    row, column = jnp.repeat(jnp.eye(h, dtype=k.dtype), w, axis=0), jnp.tile(jnp.eye(w, dtype=k.dtype), (h, 1))
    places = jnp.concatenate([row, column], -1).reshape(1, h, w, 1, h + w)
    wide = (
        jnp.concatenate([q * d**-0.5, bias_h, bias_w], -1),
        jnp.concatenate([k, jnp.broadcast_to(places, (b, h, w, n, h + w))], -1),
    )
    flat = lambda x: x.reshape(b, h * w, n, -1)
    spare = folded_width(h, w, d) - (d + h + w)
    wide = (jnp.pad(flat(x), ((0, 0),) * 3 + ((0, spare),)) for x in wide)
    return flash_attention.attend(*wide, flat(v), mesh).reshape(q.shape)
