"""Ranges of an image encoder's inputs, by what its layers saw: which layers have one, and what divides them before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from slimsam_jax.compression.integers import Quantize
from slimsam_jax.models.sam import Params
from slimsam_jax.quantization import Statistics, is_quantized, ranges, weights

PERCENTILE = 99.99  # of inputs, with ranges=percentile


def divisors(seen: dict[str, Statistics], step: Quantize) -> dict[str, np.ndarray]:
    """Those of all layers but the first, which reads the image and keeps its input; {} without `Quantize.balance`."""
    inner = dict(list(seen.items())[1:])
    return weights.divisors_of(inner, step.balance) if step.balance else {}


def with_ranges(encoder: Params, seen: dict[str, Statistics], step: Quantize) -> Params:
    """Layers whose inputs are quantised, too: all but the first, which reads the image."""
    first = next(iter(seen))

    def one(keys: tuple, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not is_quantized(leaf) or path == first:
            return leaf
        span = np.zeros(0, np.float32)
        if step.ranges != "token":
            percentile = PERCENTILE if step.ranges == "percentile" else None
            reach = seen[path].range if leaf.divisor is None else ranges.divided(seen[path].channels, leaf.divisor)
            span = ranges.static(reach, step.activations, percentile, step.ranges == "symmetric")
        return dataclasses.replace(leaf, range=span, input_bits=step.activations, integer=step.arithmetic == "integer")

    return jax.tree_util.tree_map_with_path(one, encoder, is_leaf=is_quantized)


def without_worst(encoder: Params, errors: dict[str, tuple[float, float]], count: int) -> Params:
    """Leaves the inputs of the layers as they are whose quantisation costs most by itself."""
    by_input = sorted(errors, key=lambda path: errors[path][0] - errors[path][1])[:count]

    def one(keys: tuple, leaf: Any) -> Any:
        worst = jax.tree_util.keystr(keys, simple=True, separator="/") in by_input
        return dataclasses.replace(leaf, range=None) if worst and is_quantized(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, encoder, is_leaf=is_quantized)
