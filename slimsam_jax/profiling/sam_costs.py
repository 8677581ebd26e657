"""Parameters and multiply-accumulates of a SAM, as the papers count them. Of any function: `macs` and `layers`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slimsam_jax.models.config import Config, tokens
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.sam import Architecture, abstract_head, abstract_params, image_encoder
from slimsam_jax.profiling import macs
from slimsam_jax.profiling.layers import Layer, arrays, layers
from slimsam_jax.profiling.macs import Macs


def parameters(params: Any) -> int:
    """Counts the scalars in a tree (of arrays or of shapes), as PyTorch counts a SAM.

    The frequencies of the positional encoding and batch norm's statistics are buffers there, so they do not count.
    """
    return counts.parameters(params)


def encoder_parameters(config: Architecture) -> int:
    """Of the image encoder: of a ViT in closed form, of another family by its shapes."""
    if not isinstance(config, Config):
        return parameters(abstract_params(config)["image_encoder"])
    embed, out, grid = config.embed_dim, config.out_chans, math.prod(config.grid)
    total = _conv(1, 3 * config.patch_size**2, embed) + grid * embed + embed * out + 9 * out * out + 4 * out
    for block in config.blocks:
        width = block.heads * block.head_dim
        tables = sum(2 * side - 1 for side in config.attention_span(block)) * block.head_dim
        total += 3 * _linear(1, embed, width) + _linear(1, width, embed) + tables + 4 * embed
        total += _linear(1, embed, block.mlp_dim) + _linear(1, block.mlp_dim, embed)
    return total


def sam_parameters(config: Architecture) -> int:
    """Of the whole SAM."""
    return encoder_parameters(config) + _head_parameters(config.head)


@functools.lru_cache
def _head_parameters(config: Config) -> int:
    """Of prompt encoder and mask decoder, which the encoder's widths do not touch."""
    return parameters(abstract_head(config))


def encoder_macs(config: Architecture) -> Macs:
    """Of the image encoder for one image.

    Of a ViT in closed form, which equals the reference's counter to the digit: `linear` counts biases once per call for
    a linear layer, per position for a convolution, and an activation one per element. Of another family as the papers
    count: in closed form where there is one, else in its jaxpr (which on a CPU holds no depthwise convolutions).
    """
    if not isinstance(config, Config):
        closed = counts.CLOSED_FORMS.get(type(config.encoder))
        return Macs(*closed(config.encoder)) if closed else _counted(config)
    embed, out, grid = config.embed_dim, config.out_chans, math.prod(config.grid)
    linear = _conv(grid, 3 * config.patch_size**2, embed) + grid * out * (embed + 9 * out)
    attention = 0
    for block in config.blocks:
        width, rows = block.heads * block.head_dim, tokens(config, block)
        linear += 3 * _linear(rows, embed, width) + _linear(rows, width, embed)
        linear += _linear(grid, embed, block.mlp_dim) + grid * block.mlp_dim + _linear(grid, block.mlp_dim, embed)
        span = config.attention_span(block)
        attention += rows * width * (2 * math.prod(span) + sum(span))
    return Macs(linear, attention)


@functools.lru_cache
def _counted(config: Architecture) -> Macs:
    return macs.count(*_encoder(config))


def encoder_layers(config: Architecture) -> tuple[Layer, ...]:
    """Of the image encoder for one image, counted in its jaxpr: without biases and activations, with attention."""
    return layers(arrays(*_encoder(config)))


def _encoder(config: Architecture) -> tuple[Callable, Any, Any]:
    """(function, parameters, images), the latter as shapes."""
    module = image_encoder(config, attention="plain")
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    embed = lambda params, images: module.apply({"params": params}, images)[0]
    return embed, abstract_params(config)["image_encoder"], images


def decoder_macs(config: Architecture, prompt_tokens: int | None = None) -> Macs:
    """Of the mask decoder for one prompt; without a number of tokens for one that is a point."""
    prompt_tokens = config.point_tokens if prompt_tokens is None else prompt_tokens
    width, image, hidden = config.out_chans, math.prod(config.grid), config.decoder_mlp_dim
    first, second = getattr(config.head, "upscaling_dims", (width // 4, width // 8))
    outputs = 1 + config.multimask_outputs
    scored = getattr(config.head, "object_tokens", 0)
    own = 1 + outputs + prompt_tokens + scored
    to_image = _linear(own, width, width // 2) + 2 * _linear(image, width, width // 2) + _linear(own, width // 2, width)
    to_token = (
        _linear(image, width, width // 2) + 2 * _linear(own, width, width // 2) + _linear(image, width // 2, width)
    )
    mlp = _linear(own, width, hidden) + own * hidden + _linear(own, hidden, width)
    linear = config.decoder_depth * (4 * _linear(own, width, width) + to_image + mlp + to_token) + to_image
    for positions, inputs, channels in ((4 * image, width, first), (16 * image, first, second)):
        # A transposed convolution counts as if every output saw all 2x2 taps; then its GELU.
        linear += _conv(positions, 4 * inputs, channels) + positions * channels
    linear += outputs * (2 * _linear(1, width, width) + _linear(1, width, second))
    linear += 2 * _linear(1, width, config.iou_head_dim) + _linear(1, config.iou_head_dim, outputs)
    linear += scored * (2 * _linear(1, width, width) + _linear(1, width, 1))
    products = 2 * own * own * width + (2 * own * image * width // 2) * 2
    attention = config.decoder_depth * products + 2 * own * image * width // 2
    return Macs(linear, attention + outputs * 16 * image * second)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return rows * inputs * outputs + outputs


def _conv(positions: int, inputs: int, outputs: int) -> int:
    return positions * (inputs * outputs + outputs)
