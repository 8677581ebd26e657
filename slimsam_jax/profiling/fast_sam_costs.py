"""What a FastSAM costs: parameters and multiply-accumulates, of the whole and of its layers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from slimsam_jax.models.encoders.counts import parameters
from slimsam_jax.models.fast_sam import Config, Network, abstract_params, decode
from slimsam_jax.models.fast_sam_config import BINS
from slimsam_jax.profiling import macs

__all__ = ["macs_of", "parameters", "parameters_of"]


def parameters_of(config: Config) -> int:
    """As PyTorch counts them: without the statistics of batch norms, with the fixed bins of the boxes' distances."""
    return parameters(abstract_params(config)) + BINS


@functools.lru_cache
def macs_of(config: Config) -> int:
    """Of convolutions, and of the mean over bins, for one square image. Nothing is computed."""

    def run(params, images):
        outputs, _ = Network(config).apply({"params": params}, images)
        return decode(outputs), outputs.prototypes

    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return macs.count(run, abstract_params(config), images).total
