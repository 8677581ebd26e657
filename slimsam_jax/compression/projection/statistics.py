"""What bases are chosen from: second moments of activations, and of the embedding's gradient, over images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slimsam_jax.models.config import GLOBAL
from slimsam_jax.models.encoders.vit import stream_features, window_partition
from slimsam_jax.models.sam import Architecture, Params, encoder_for, preprocess, run_encoder
from slimsam_jax.pruning.gradients import image_keys

Weighting = Literal["none", "disturbed"]


def in_float64(tree: Moments) -> Moments:
    """In float64."""
    return jax.tree.map(np.float64, tree)


def like(encoder: Params, new: Params) -> Params:
    """`new` in the dtype of the encoder that it was made from, on the host: nothing is compiled to convert it."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, _first_leaf(encoder).dtype), new)


def _first_leaf(encoder: Params) -> jax.Array:
    """All have its dtype, and lie where it does."""
    return jax.tree.leaves(encoder)[0]


Batch = dict[str, Any]
Moments = dict[str, Any]
Statistic = Callable[[Params, Batch, jax.Array], Any]  # encoder, batch, keys [b] of noise -> sums over the batch
Part = Literal["stream", "attention", "mlp", "sensitivity"]
LAYERNORM_EPSILON = 1e-6


def accumulate(statistic: Statistic, encoder: Params, batches: Iterable[Batch], seed: int = 0) -> Any:
    """Sum of a tree of statistics over batches, on the device; numpy out, of the dtype that was summed.

    Moments of all hidden units of SAM-H are 3.4 GB in float32, so float64 is for who computes with one block's.

    Raises:
      ValueError: there was no batch.
    """
    found, add = programs(statistic)
    total, key, seen = None, jax.random.key(seed), 0
    for batch in batches:
        if total is None:
            zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), _first_leaf(encoder).sharding)
            total = jax.tree.map(zeros, jax.eval_shape(found, encoder, batch, key, seen))
        total = add(total, encoder, batch, key, seen)
        seen += len(batch["image"])
    if total is None:
        raise ValueError("statistics need at least one batch")
    return jax.device_get(total)


@functools.lru_cache(maxsize=4)
def programs(statistic: Statistic) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a statistic finds, and that added to a total, which is donated; compiled once for the same statistic."""

    @jax.jit  # traced once, though asked for its shapes and then for sums
    def found(encoder: Params, batch: Batch, key: jax.Array, seen: int) -> Any:
        # By the image's own seed: its place in a batch depends on how many processes and devices there are.
        keys = image_keys(key, batch["seed"] if "seed" in batch else seen + jnp.arange(len(batch["image"])))
        with jax.default_matmul_precision("highest"):  # accelerators would round Gram matrices to 10 bits
            return statistic(encoder, batch, keys)

    def add(total: Any, *inputs: Any) -> Any:
        return jax.tree.map(jnp.add, total, found(*inputs))

    return found, jax.jit(add, donate_argnums=0)


def moments_of(config: Architecture, parts: Sequence[Part], mesh: Mesh | None = None) -> Statistic:
    """The statistic that gives {part: moments} of the parts asked for, of SAM's ViT or EfficientSAM's.

    The mesh is of the devices that batches are split over; None for one device.

    Parts:
      stream: [D, D] second moment of the residual stream after patch embedding and after the attention and
        the MLP of every block together, each token centred and scaled as LayerNorm will.
      attention, mlp: a dict per block, see `attention_moments` and `mlp_moments`.
      sensitivity: see `_sensitivity`; takes a backward pass.
    """

    def statistic(encoder: Params, batch: Batch, keys: jax.Array) -> dict[str, Any]:
        embedding, features = run_encoder(config, encoder, batch, mesh=mesh)
        blocks = [features[f"blocks_{i}"] for i in range(len(config.encoder.blocks))]
        found: dict[str, Any] = {
            "tokens": jnp.array(float(embedding[..., 0].size)),
            "embedding": jnp.square(embedding - embedding.mean()).sum(),
            "blocks": [variance_of(block["out"]) for block in blocks],
        }
        if "stream" in parts:
            found["stream"] = sum(gram(normalised(x)) for x in stream_features(config.encoder, features)["stream"])
        if "attention" in parts:
            real = [_real_tokens(config, block) for block in config.encoder.blocks]
            found["attention"] = [attention_moments(*pair) for pair in zip(blocks, real, strict=True)]
        if "mlp" in parts:
            found["mlp"] = [mlp_moments(block) for block in blocks]
        if "sensitivity" in parts:
            found["sensitivity"] = _sensitivity(config, encoder, batch, keys, mesh)
        return found

    return statistic


def gram(x: jax.Array) -> jax.Array:
    """[..., c] -> [c, c]: sum of x xᵀ."""
    x = x.reshape(-1, x.shape[-1])
    return x.T @ x


def across(narrow: jax.Array, x: jax.Array) -> Moments:
    """Moments of what is left with itself, [d, d], and with what there was, [d, D], and the sums of both."""
    flat = lambda x: x.reshape(-1, x.shape[-1])
    own = second(narrow)
    return {**own, "cross": flat(narrow).T @ flat(x), "wide_sum": x.sum((0, 1, 2))}


def second(x: jax.Array) -> Moments:
    """Second moment [D, D] and sum [D] of vectors, and their number."""
    return {"second": gram(x), "sum": x.sum((0, 1, 2)), "tokens": jnp.array(float(math.prod(x.shape[:3])))}


def normalised(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + LAYERNORM_EPSILON)


def variance_of(stream: jax.Array) -> jax.Array:
    """Sum over tokens and channels of a stream's squares, each token centred."""
    return jnp.square(stream - stream.mean(-1, keepdims=True)).sum()


def _real_tokens(config: Architecture, block: Any) -> jax.Array:
    """1 for a token, 0 for what pads a window; broadcasts to [b * windows, rows, columns, 1, 1]."""
    real, window = jnp.ones((1, *config.grid, 1)), getattr(block, "window", GLOBAL)
    return (real if window == GLOBAL else window_partition(real, window))[..., None]


def attention_moments(block: dict[str, jax.Array], real: jax.Array) -> Moments:
    """Second moments of q and k (mean over heads), of each head's output, its sum, and the number of tokens.

    The padding of windows is left out where nobody reads it: in q and the outputs. As keys it is attended to.
    """
    windows = block["q"].shape[0] // real.shape[0]
    real = jnp.tile(real, (windows, 1, 1, 1, 1))
    flat = lambda x: x.reshape(-1, *x.shape[-2:])
    q, k, o = flat(block["q"] * real), flat(block["k"]), flat(block["heads"] * real)
    return {
        "q": gram(q) / q.shape[1],
        "k": gram(k) / k.shape[1],
        "keys": jnp.array(float(len(k))),
        "output": jnp.einsum("tni,tnj->nij", o, o),
        "output_sum": o.sum(0),
        "tokens": real.sum(),
    }


def mlp_moments(block: dict[str, jax.Array]) -> Moments:
    """Second moment and sum of the hidden activations, and the number of tokens."""
    hidden = block["mlp"].reshape(-1, block["mlp"].shape[-1])
    return {"hidden": gram(hidden), "hidden_sum": hidden.sum(0), "tokens": jnp.array(float(len(hidden)))}


def _sensitivity(
    config: Architecture, encoder: Params, batch: Batch, keys: jax.Array, mesh: Mesh | None = None
) -> dict[str, Any]:
    """How an error inside shows in the embedding: the disturbed gradient's second moments.

    With unit noise ε at the embedding and g = Jᵀε the gradient somewhere inside, E[g gᵀ] = JᵀJ:
    a small error δ there is an error of |J δ|² = E[(g·δ)²] of the embedding. Only the terms within
    a token are kept, as if the errors of different tokens were not correlated.

    Returns:
      Sums over tokens: "middle", "out": a [D, D] per block, "queries": a [d, d] per block (mean over heads).
    """
    noise = lambda x: jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    grads = pulled_back(config, encoder, batch, noise, mesh)
    widths = config.encoder.blocks
    blocks = [grads[f"blocks_{i}"] for i in range(len(widths))]
    return {
        **{name: [gram(block[name]) for block in blocks] for name in ("middle", "out")},
        "queries": [gram(block["attn"]["queries"]) / widths[i].heads for i, block in enumerate(blocks)],
    }


def pulled_back(
    config: Architecture, encoder: Params, batch: Batch, noise: Callable[[Any], Any], mesh: Mesh | None = None
) -> Any:
    """The gradient of noise * embedding by all that the encoder lets be perturbed: Flax's collection "perturbations".

    Args:
      noise: of an embedding, one array or a dict of maps.
    """
    pixels = preprocess(config, batch["image"], batch["size"])
    model = encoder_for(config, len(pixels), _first_leaf(encoder).dtype, mesh=mesh)
    shapes = jax.eval_shape(model.init, jax.random.key(0), pixels)["perturbations"]

    def embed(perturbations: Any) -> Any:
        return model.apply({"params": encoder, "perturbations": perturbations}, pixels)[0]

    embedding, pull_back = jax.vjp(embed, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    (grads,) = pull_back(noise(embedding))
    return grads
