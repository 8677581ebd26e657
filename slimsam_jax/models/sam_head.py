"""SAM's own head: its prompt encoder and mask decoder joined. One of `models.heads.HEADS`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.imaging.prompts import ABSENT
from slimsam_jax.models.config import Config
from slimsam_jax.models.mask_decoder import MaskDecoder
from slimsam_jax.models.prompt_encoder import PromptEncoder
from slimsam_jax.quantization.codes import dequantize

HeadConfig = Config  # without a ViT


def from_json(fields: Mapping[str, Any]) -> Config:
    """Inverse of `Config.to_json`, of a head."""
    return Config.from_json(fields, blocks=False)


def refusal(labels: np.ndarray, masked: bool) -> str | None:
    """SAM takes all prompts."""
    return None


def init(config: Config, keys: Sequence[jax.Array]) -> dict[str, Any]:
    """Random {"prompt_encoder", "mask_decoder"}, by two keys."""
    embedding = jnp.zeros((*config.grid, config.out_chans))
    points, labels = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32)
    masks = jnp.zeros((1, 4 * config.grid[0], 4 * config.grid[1], 1))
    prompt_encoder = PromptEncoder(config)
    prompts = prompt_encoder.init(keys[0], points, labels, masks)
    sparse, dense = prompt_encoder.apply(prompts, points, labels, masks)
    decoder = MaskDecoder(config).init(keys[1], embedding, embedding, sparse, dense)["params"]
    return {"prompt_encoder": prompts["params"], "mask_decoder": decoder}


@functools.partial(jax.jit, static_argnames="config")
def decode(config: Config, params: dict[str, Any], embedding, points, labels, masks=None, masked=None):
    """See `sam.decode`."""
    return _decode(config, params, embedding, points, labels, masks, masked)[0]


@functools.partial(jax.jit, static_argnames="config")
def decode_tokens(config: Config, params: dict[str, Any], embedding, points, labels):
    """See `sam.decode_tokens`."""
    outputs, seen = _decode(config, params, embedding, points, labels)
    return (*outputs, seen["intermediates"]["tokens"][0])


def _decode(config: Config, params: dict[str, Any], embedding, points, labels, masks=None, masked=None):
    """The outputs of `MaskDecoder`, and what it sows."""
    params = dequantize(params)
    prompt_encoder = nn.apply(lambda m: (m(points, labels, masks, masked), m.dense_positions()), PromptEncoder(config))
    with jax.default_matmul_precision("highest"):  # positions are phases of many turns: they bear no rounding
        (sparse, dense), positions = prompt_encoder({"params": params["prompt_encoder"]})
        inputs = (embedding, positions, sparse, dense, labels != ABSENT)
        return MaskDecoder(config).apply({"params": params["mask_decoder"]}, *inputs, mutable=["intermediates"])
