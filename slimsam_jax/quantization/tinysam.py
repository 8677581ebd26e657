"""TinySAM's post-training quantisation (Shu et al., AAAI 2025, section 3.3), as functions, to be compared with.

All is fake quantisation: values that codes of b bits stand for, Q = 2^(b-1) codes on either side. Operands are cut into
blocks, each with a scale of its own; what GELU and softmax put out has two ranges, which are no one tensor of integers.
Scales are searched so that the output's error, weighted by the squared gradient of the task's loss, is least.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.quantization.ranges import whole

LEAST_GELU = -0.16997124  # GELU's minimum, which the range below zero ends at
GRID = (0.01, 1.2, 100)  # factors on the largest value's scale that the search tries: from, to, how many


def fake(x: Any, interval: Any, bits: int) -> jax.Array:
    """Symmetric codes -Q to Q-1; the interval is the step. Halves go to the even code, by division."""
    return jnp.clip(whole(x / interval), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * interval


def fake_blocks(x: Any, interval: Any, bits: int, quantize: Callable[..., jax.Array] = fake) -> jax.Array:
    """Codes by blocks: every axis is cut into as many as the interval's is long, the last one perhaps shorter.

    Args:
      x: of any shape.
      interval: [n, m, ...], one for each of x's last axes; 1 for an axis that is not cut.
    """
    x, interval = jnp.asarray(x), jnp.asarray(interval)
    counts = (1,) * (x.ndim - interval.ndim) + interval.shape
    sizes = [-(-length // count) for length, count in zip(x.shape, counts, strict=True)]
    steps = interval.reshape(counts)
    for axis, (size, length) in enumerate(zip(sizes, x.shape, strict=True)):
        if counts[axis] > 1:
            steps = jnp.take(steps, np.arange(length) // size, axis)
    return quantize(x, steps, bits)


def fake_post_gelu(x: Any, interval: Any, bits: int, negative: float | None = None) -> jax.Array:
    """Two ranges: Q codes above zero, with the interval, and Q below, down to GELU's minimum."""
    half = 2 ** (bits - 1)
    negative = -LEAST_GELU / half if negative is None else negative
    above = jnp.clip(whole(x / interval), 0, half - 1) * interval
    return above + jnp.clip(whole(x / negative), -half, 0) * negative


def fake_post_softmax(x: Any, interval: Any, split: float, bits: int) -> jax.Array:
    """Two ranges: from `split` to 1 in steps of 1/(Q-1), and up to `split` in steps of the interval, added.

    So both are added everywhere in the original: all values are too large by `split`, about, in its codes.
    """
    last = 2 ** (bits - 1) - 1
    above = jnp.clip(jnp.round(jnp.clip(x, split, 1) * last), 0, last) / last
    return above + jnp.clip(jnp.round(jnp.clip(x, 0, split) / interval), 0, last) * interval


def fake_shifted(x: Any, interval: Any, shift: Any, bits: int) -> jax.Array:
    """Codes of values less a shift that is no whole number of steps: a convolution's input."""
    return x if bits >= 32 else fake(x - shift, interval, bits) + shift


def largest_interval(x: Any, bits: int) -> float:
    """The interval whose last code is the largest value, which the grid multiplies."""
    return float(max(np.abs(np.asarray(x)).max() / 2 ** (bits - 1), 1e-12))


def search(
    output: Callable[[list[jax.Array]], jax.Array],
    operands: Sequence[Any],
    quantizers: Sequence[Callable[[Any, Any, int], jax.Array]],
    bits: Sequence[int],
    weight: Any,
    rounds: int = 3,
    blocks: Sequence[tuple[int, ...]] | None = None,
    grid: tuple[float, float, int] = GRID,
) -> list[np.ndarray]:
    """Intervals of a product's operands, the scale of one after the other, the others' fixed (alternating).

    Args:
      output: what the layer computes of its operands.
      operands: plain, the weights last.
      quantizers: of each operand, as `fake_blocks`: (values, interval, bits).
      bits: of each.
      weight: of the output's errors, of its shape: the squared gradient of the task's loss (Hessian-guided), or 1.
      rounds: over all operands.
      blocks: shapes of the intervals; None for one of each operand.
      grid: from, to, how many factors on the scale of the largest value.

    Returns:
      an interval for each operand.

    Raises:
      InputError: rounds or grid of none.
    """
    if rounds < 1 or grid[2] < 1 or not 0 < grid[0] <= grid[1]:
        raise InputError(f"a search of {rounds} rounds over {grid} factors finds nothing: give at least one of each")
    operands = [jnp.asarray(x) for x in operands]
    shapes = blocks or [(1,)] * len(operands)
    start = [largest_interval(x, b) for x, b in zip(operands, bits, strict=True)]
    intervals = [np.full(shape, first, np.float32) for shape, first in zip(shapes, start, strict=True)]
    plain = output(operands)

    @jax.jit
    def error(intervals: list[jax.Array]) -> jax.Array:
        coded = [q(x, i, b) for q, x, i, b in zip(quantizers, operands, intervals, bits, strict=True)]
        return (weight * jnp.square(output(coded) - plain)).sum()

    factors = np.linspace(*grid).astype(np.float32)
    for _, which in itertools.product(range(rounds), reversed(range(len(operands)))):
        for place in np.ndindex(intervals[which].shape):
            intervals[which] = _best(error, intervals, which, place, factors * start[which])
    return intervals


def _best(error: Callable, intervals: list[np.ndarray], which: int, place: tuple, tried: np.ndarray) -> np.ndarray:
    """One operand's intervals with the best of several at one place; the one that is there if none is better."""
    best, least = intervals[which], float(error(intervals))
    for value in tried:
        new = intervals[which].copy()
        new[place] = value
        if (own := float(error([*intervals[:which], new, *intervals[which + 1 :]]))) < least:
            best, least = new, own
    return best
