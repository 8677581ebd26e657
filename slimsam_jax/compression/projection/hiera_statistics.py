"""What Hiera's bases are chosen from: `statistics`, with streams of four resolutions and an embedding of three maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slimsam_jax.compression.projection.statistics import (
    Batch,
    Moments,
    Part,
    Statistic,
    across,
    attention_moments,
    gram,
    mlp_moments,
    normalised,
    pulled_back,
    second,
    variance_of,
)
from slimsam_jax.models.encoders.hiera import pool
from slimsam_jax.models.encoders.hiera_config import Place, places
from slimsam_jax.models.encoders.vit import window_partition
from slimsam_jax.models.sam import Architecture, Params, run_encoder


def moments_of(config: Architecture, parts: Sequence[Part]) -> Statistic:
    """The statistic that gives {part: moments} of the parts asked for.

    Parts: as those of `statistics.moments_of`, in which errors and gains are shares: of a stream's variance ("blocks",
    of a token), and of the variance of an image's maps, each of which counts alike ("embedding" is their number). But
      stream: {"blocks": a dict per block, {"norm1", "norm2"}: see `statistics.second`, of tokens centred and scaled as
        the norm will, "ends": of the four streams where the neck reads them, as they are}. If the encoder's tree has
        "changes", [d, D] of each stage, see `statistics.across` instead: of streams x and what is left, changes x.
    """

    def statistic(encoder: Params, batch: Batch, keys: jax.Array) -> dict[str, Any]:
        encoder, changes = dict(encoder), encoder.get("changes")
        encoder.pop("changes", None)
        maps, features = run_encoder(config, encoder, batch)
        spots = places(config.encoder)
        blocks = [features[f"blocks_{i}"] for i in range(len(spots))]
        found: dict[str, Any] = {
            "tokens": jnp.array(float(len(keys))),
            "embedding": jnp.array(float(len(maps) * len(keys))),
            "blocks": [variance_of(block["out"]) / math.prod(block["out"].shape[1:3]) for block in blocks],
        }
        if "stream" in parts:
            found["stream"] = _streams(config, features, blocks, changes)
        if "attention" in parts:
            found["attention"] = [
                attention_moments(*_real(place, block)) for place, block in zip(spots, blocks, strict=True)
            ]
        if "mlp" in parts:
            found["mlp"] = [mlp_moments(block) for block in blocks]
        if "sensitivity" in parts:
            found["sensitivity"] = _sensitivity(config, encoder, batch, keys)
        return found

    return statistic


def _streams(config: Architecture, features: Any, blocks: Sequence[Any], changes: Any) -> Moments:
    before, spots = [features["patch"]["out"], *(block["out"] for block in blocks)], places(config.encoder)

    def ask(x: jax.Array, stage: int, normal: Any = lambda x: x) -> Moments:
        return second(normal(x)) if changes is None else across(normal(x @ changes[stage].T), normal(x))

    own = [
        {"norm1": ask(x, place.stage - place.pools, normalised), "norm2": ask(block["middle"], place.stage, normalised)}
        for x, place, block in zip(before, spots, blocks, strict=False)
    ]
    lasts = [*config.encoder.firsts[1:], len(blocks)]
    return {"blocks": own, "ends": [ask(before[last], stage) for stage, last in enumerate(lasts)]}


def _real(place: Place, block: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """A block's features, its queries as they are attended with, and 1 for a query, 0 for what pads a window."""
    real = jnp.ones((1, *place.grid, 1))
    real = window_partition(real, place.window) if place.window else real
    if place.pools:
        block, real = {**block, "q": pool(block["q"])}, pool(real)
    return block, real[..., None]


def _sensitivity(config: Architecture, encoder: Params, batch: Batch, keys: jax.Array) -> dict[str, Any]:
    """As `statistics._sensitivity`, of each image's maps each by its own deviation."""

    def noise(key: jax.Array, of_image: dict[str, jax.Array]) -> dict[str, jax.Array]:
        own = dict(zip(of_image, jax.random.split(key, len(of_image)), strict=True))
        size = lambda x: jnp.sqrt(jnp.square(x - x.mean()).sum())
        return {name: jax.random.normal(own[name], x.shape, x.dtype) / size(x) for name, x in of_image.items()}

    grads = pulled_back(config, encoder, batch, lambda maps: jax.vmap(noise)(keys, maps))
    blocks = [grads[f"blocks_{i}"] for i in range(config.encoder.depth)]
    return {
        **{name: [gram(block[name]) for block in blocks] for name in ("middle", "out")},
        "queries": [gram(block["attn"]["queries"]) / block["attn"]["queries"].shape[-2] for block in blocks],
    }
