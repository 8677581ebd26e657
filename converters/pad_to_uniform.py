"""Makes an exact twin with equal blocks for code that knows no others, at the price of computing with zeros.

Stock `segment_anything` and `transformers` have one number of heads, one MLP width and one window, and channels per
head are always embed_dim / heads. Heads, channels and hidden units of zeros change nothing but the softmax, which
divides by the root of the channels per head: q makes up for it, and the position tables, which q reads before that,
for q. Where the embedding is too narrow for its heads it is widened, and there zeros would change every LayerNorm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.models.config import GLOBAL, Config
from slimsam_jax.models.sam import Params, Sam, abstract_params, dequantized


def uniform_config(config: Config) -> Config:
    """Returns the narrowest architecture with equal blocks, heads * head_dim == embed_dim, that holds `config`.

    Raises:
      InputError: windows of several sizes, which no padding makes equal.
    """
    windows = sorted({block.window for block in config.blocks} - {GLOBAL})
    if len(windows) > 1:
        sides = ", ".join(map(str, windows))
        raise InputError(f"stock code has one window for all blocks, and this model's are {sides} tokens wide")
    widths = {name: max(getattr(b, name) for b in config.blocks) for name in ("heads", "head_dim", "mlp_dim")}
    widths["head_dim"] = max(widths["head_dim"], -(-config.embed_dim // widths["heads"]))
    blocks = tuple(dataclasses.replace(block, **widths) for block in config.blocks)
    return dataclasses.replace(config, embed_dim=widths["heads"] * widths["head_dim"], blocks=blocks)


def pad_to_uniform(sam: Sam) -> Sam:
    """Makes the twin with `uniform_config`: the same embeddings and masks, up to rounding.

    Raises:
      InputError: as `uniform_config`.
    """
    config = uniform_config(sam.config)
    sam = dequantized(sam)
    encoder = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sam.params["image_encoder"])
    for i, (old, new) in enumerate(zip(sam.config.blocks, config.blocks, strict=True)):
        block, factor = encoder[f"blocks_{i}"], (new.head_dim / old.head_dim) ** 0.5
        encoder[f"blocks_{i}"] = {**block, "attn": _keep_logits(block["attn"], factor)}
    if config.embed_dim > sam.config.embed_dim:
        encoder = _widen(encoder, config.embed_dim)
    padded = jax.tree.map(_zero_pad, encoder, abstract_params(config)["image_encoder"])
    return dataclasses.replace(sam, config=config, params={**sam.params, "image_encoder": padded})


def _keep_logits(attn: Params, factor: float) -> Params:
    """Keeps the logits of a softmax that divides by `factor` times as much: q grows by it, what q reads shrinks."""
    q = {name: factor * array for name, array in attn["q"].items()}
    return {**attn, "q": q, **{name: attn[name] / factor for name in ("rel_pos_h", "rel_pos_w")}}


def _widen(encoder: Params, size: int) -> Params:
    """Widens a residual stream to `size` channels whose LayerNorms give what they gave on the D before.

    Zeros would change mean and variance. So the new channels hold the mean of the old ones, and the old ones keep s
    times their distance from it, s² = size / D: mean and variance stay, LayerNorm gives s times what it gave (and
    zero for the new ones), and its scale undoes that. What writes to the stream is linear, and so is the neck, the
    one reader besides the norms: it finds x = mean + (x' - mean) / s, the mean being any of the new channels.
    """
    old = encoder["pos_embed"].shape[-1]
    stretch = (size / old) ** 0.5

    def writes(array: np.ndarray) -> np.ndarray:
        mean = array.mean(-1, keepdims=True)
        new = np.broadcast_to(mean, (*array.shape[:-1], size - old))
        return np.concatenate([mean + stretch * (array - mean), new], -1)

    kernel = encoder["neck_0"]["kernel"]  # [1, 1, D, out_chans]
    means = np.repeat((1 - 1 / stretch) * kernel.sum(2, keepdims=True) / (size - old), size - old, 2)
    wide = {**encoder, "pos_embed": writes(encoder["pos_embed"])}
    wide["patch_embed_proj"] = jax.tree.map(writes, encoder["patch_embed_proj"])
    wide["neck_0"] = {"kernel": np.concatenate([kernel / stretch, means], 2)}
    for name in (name for name in encoder if name.startswith("blocks_")):
        block = encoder[name]
        norms = {n: {**block[n], "scale": block[n]["scale"] / stretch} for n in ("norm1", "norm2")}
        attn = {**block["attn"], "proj": jax.tree.map(writes, block["attn"]["proj"])}
        wide[name] = {**block, **norms, "attn": attn, "mlp_lin2": jax.tree.map(writes, block["mlp_lin2"])}
    return wide


def _zero_pad(array: np.ndarray, target: Any) -> jax.Array:
    """Pads zeros behind the entries of each axis, up to `target.shape`."""
    missing = [(0, new - old) for old, new in zip(array.shape, target.shape, strict=True)]
    return jnp.asarray(np.pad(array, missing), target.dtype)
