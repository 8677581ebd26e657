"""A teacher against projections: an encoder of random weights whose residual stream fills all its directions evenly.

    python -m experiments.isotropic slimsam_jax/assets/sam_small_v2 --images bsds_train --out isotropic

Where every direction carries as much as any other, a choice of the basis before the cut has nothing to gain by variance
alone. The patch embedding is whitened on images, blocks and neck are drawn with gains that keep their inputs' size; the
decoder is the SAM's, and has no use for what it gets: what cuts cost is to be read off the embedding's error
(`experiments.teachers`), not off masks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tyro.conf import Positional

import slimsam_jax
from slimsam_jax import cli, data
from slimsam_jax.compression.projection.statistics import accumulate
from slimsam_jax.data.batches import Batches
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.encoders.vit import stream_features
from slimsam_jax.models.sam import Params, Sam, run_encoder

BATCH, IMAGES = 4, 100  # that the patch embedding is whitened on
AXES_OUT = dict.fromkeys("qkv", 2)  # of these kernels head and channel are outputs


def make(sam: Positional[Path], images: str, out: Path, seed: int = 0) -> None:
    """Write such a teacher.

    Args:
      sam: a SAM of a ViT, whose architecture and decoder it has.
      images: folder to whiten the patch embedding on.
      out: model folder to write.
      seed: of the weights.
    """
    like = slimsam_jax.load(sam)
    batches = Batches(data.find([images]), like.config.image_size, BATCH, 0, frame=like.config.frame)
    slimsam_jax.save(isotropic(like, itertools.islice(batches, IMAGES // BATCH), seed), out)
    batches.close()


def isotropic(like: Sam, batches: Iterable[dict[str, Any]], seed: int) -> Sam:
    """A SAM with such an encoder, and the decoder of `like`."""
    random, leaves = np.random.default_rng(seed), sorted(flatten_dict(like.encoder).items())
    drawn = unflatten_dict({path: draw(path, leaf.shape, random) for path, leaf in leaves})
    patch = drawn["patch_embed_proj"]
    mean, moment = moments(like.config, drawn, batches)
    values, vectors = np.linalg.eigh(moment - np.outer(mean, mean))
    whitening = np.float32(vectors / np.sqrt(values) @ vectors.T)
    patch = {"kernel": patch["kernel"] @ whitening, "bias": np.float32(-mean @ whitening)}
    params = {**like.params, "image_encoder": {**drawn, "patch_embed_proj": patch}}
    return dataclasses.replace(like, params=params, provenance={"isotropic": {"seed": seed}}, thresholds=None)


def draw(path: tuple[str, ...], shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Kernels of a variance of one over their inputs; norms that do nothing; no biases, no positions."""
    if path[-1] != "kernel":
        return np.full(shape, float(path[-1] == "scale"), np.float32)
    inputs = np.prod(shape[: -AXES_OUT.get(path[-2], 1)])
    return random.normal(0, inputs**-0.5, shape).astype(np.float32)


def moments(config: SamConfig, encoder: Params, batches: Iterable[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and second moment [D, D] of what the patch embedding gives, float64."""

    def statistic(encoder: Params, batch: dict[str, Any], keys: jax.Array) -> dict[str, Any]:
        tokens = stream_features(config.encoder, run_encoder(config, encoder, batch)[1])["stream"][0]
        tokens = tokens.reshape(-1, tokens.shape[-1])
        return {"count": jnp.array(float(len(tokens))), "sum": tokens.sum(0), "moment": tokens.T @ tokens}

    found = accumulate(statistic, jax.device_put(encoder), batches)
    return np.float64(found["sum"]) / found["count"], np.float64(found["moment"]) / found["count"]


if __name__ == "__main__":
    cli.run(make)
