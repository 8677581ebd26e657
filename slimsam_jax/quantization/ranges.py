"""Quantises inputs of layers: scales and zeros of ranges, or scales of each token as it comes.

All functions return what the integers stand for, so that any function can be judged before integers are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range as Limits
from slimsam_jax.limits import check
from slimsam_jax.quantization.capture import Range

BITS = Limits(3, 8, True)
TINY = 1e-12  # a scale of inputs that are all zero


def static(span: Range, bits: int = 8, percentile: float | None = None, symmetric: bool = False) -> np.ndarray:
    """The scale and the zero of a range, [2] float32: value = scale (code - zero), codes 0 to 2^bits - 1.

    The range always includes 0, which padding needs exactly, and the zero is a whole number.

    Args:
      symmetric: reach as far below 0 as above: the zero is the middle code, and signed codes need none.
      percentile: one of `span.percentiles` in the place of the extremes, which may be outliers.

    Raises:
      InputError: bits out of range, a percentile that was not captured, or a range that is none.
    """
    check("bits of activations", bits, BITS)
    if percentile is not None and percentile not in span.percentiles:
        raise InputError(f"the percentile {percentile} was not captured, but {list(span.percentiles) or 'none'}")
    low, high = span.percentiles[percentile] if percentile is not None else (span.low, span.high)
    if not np.isfinite([low, high]).all() or low > high:
        raise InputError(f"a range from {low} to {high} is none: calibrate again")
    if symmetric:
        return np.array([max(-low, high, TINY) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)], np.float32)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, TINY) / (2**bits - 1)
    return np.array([scale, np.round(-low / scale)], np.float32)


def divided(channels: np.ndarray, divisor: np.ndarray) -> Range:
    """The range of an input whose channels, [2, ...] their least and greatest values, are divided."""
    return Range(float((channels[0] / divisor).min()), float((channels[1] / divisor).max()))


@jax.custom_jvp
def whole(x: jax.Array) -> jax.Array:
    """The nearest whole numbers, the even one of two, with the gradient of x itself ("straight through")."""
    return jnp.round(x)


@whole.defjvp
def _whole_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
    return whole(*primals), *tangents


def encode(x: jax.Array, span: Any, bits: int = 8) -> jax.Array:
    """Codes of values by the scale and zero of `static`, whole numbers from 0 to 2^bits - 1."""
    return jnp.clip(whole(x / span[0]) + span[1], 0, 2**bits - 1)


def fake(x: jax.Array, span: Any, bits: int = 8) -> jax.Array:
    """What the codes of values stand for; see `encode`."""
    return (encode(x, span, bits) - span[1]) * span[0]


def token_scales(x: jax.Array, axes: Sequence[int], bits: int = 8) -> jax.Array:
    """A symmetric scale for each token, whose values lie along `axes`; these become 1."""
    return jnp.maximum(jnp.abs(x).max(tuple(axes), keepdims=True), TINY) / (2 ** (bits - 1) - 1)


def fake_tokens(x: jax.Array, axes: Sequence[int], bits: int = 8) -> jax.Array:
    """What codes with a scale per token stand for: dynamic quantisation, without calibration."""
    scale = token_scales(x, axes, bits)
    return whole(x / scale) * scale
