"""Quantises the weights of a tree, by what their layers saw of a calibration set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.limits import check_weight_group
from slimsam_jax.quantization import gptq
from slimsam_jax.quantization.capture import Statistics
from slimsam_jax.quantization.codes import Quantized, is_quantized, levels, storage

Method = Literal["gptq", "search", "absmax"]
TINY = 1e-12  # a scale of channels that are all zero
LEAST_REACH = 1e-4  # of a channel, relative to the one that reaches farthest: a silent one may speak on other images


def quantize(
    params: Any,
    statistics: Mapping[str, Statistics],
    bits: int = 8,
    group: int = 0,
    method: Method = "gptq",
    divisors: Mapping[str, np.ndarray] | None = None,
    bias_correction: bool = False,
) -> Any:
    """Puts integers in the place of the parameters that layers were seen to read; others stay as they are.

    Args:
      params: a tree of arrays.
      statistics: of those to quantise, from `capture`.
      bits: 8, 6, 4 or 3.
      group: inputs of a channel that share a scale, 32 say; 0 for all of them. A layer whose inputs are no multiple
        of it has one scale a channel.
      method: "gptq", errors made up for by other weights; "search", each weight rounded by itself, with the scale whose
        error is least; "absmax", the scale of the largest weight.
      divisors: of inputs, by paths of parameters: see `divisors_of`.
      bias_correction: move each `bias` beside a `kernel` by the mean error of what its layer puts out.

    Returns:
      the tree with a `Quantized` for each of them.

    Raises:
      InputError: there are no such bits, group or method, or a parameter has values that are not finite.
    """
    levels(bits)
    check_weight_group(group)

    def one(keys: tuple, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path not in statistics:
            return leaf
        if not np.isfinite(array := np.asarray(leaf, np.float64)).all():
            raise InputError(f"{path} has values that are not finite, and cannot be quantised")
        return quantize_array(array, statistics[path], bits, group, method, (divisors or {}).get(path))

    integers = jax.tree_util.tree_map_with_path(one, params)
    return _corrected(params, integers, statistics) if bias_correction else integers


def _corrected(params: Any, integers: Any, statistics: Mapping[str, Statistics]) -> Any:
    """With biases that make up for the mean error of integers."""
    name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    plain = {name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    nodes = {name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(integers, is_leaf=is_quantized)}

    def one(keys: tuple, leaf: Any) -> Any:
        path = name(keys)
        kernel = path.removesuffix("bias") + "kernel"
        if not path.endswith("bias") or not is_quantized(nodes.get(kernel)):
            return leaf
        seen, error = statistics[kernel], np.asarray(plain[kernel], np.float64) - np.asarray(nodes[kernel].dequantize())
        moved = np.einsum("io,oi->o", to_matrix(error, seen.axes), seen.mean[seen.group_of])
        return (np.asarray(leaf, np.float64) + moved.reshape(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, integers, is_leaf=is_quantized)


def quantize_array(
    array: np.ndarray,
    seen: Statistics,
    bits: int,
    group: int = 0,
    method: Method = "gptq",
    divisor: np.ndarray | None = None,
) -> Quantized:
    """One parameter; see `quantize`."""
    if divisor is not None:
        seen, array = _divided(seen, divisor, array.shape), array * divisor.astype(np.float64)
    matrix = to_matrix(array, seen.axes)
    if matrix.shape != (seen.moment.shape[1], len(seen.group_of)):
        raise InputError(f"a parameter of shape {array.shape} was calibrated with another shape")
    codes, scale = np.empty_like(matrix), None
    for number, moment in enumerate(seen.moment):
        own = seen.group_of == number
        codes[:, own], scales = _quantized(matrix[:, own], moment, bits, group, method)
        scale = np.empty((len(scales), len(own))) if scale is None else scale
        scale[:, own] = scales
    shape = tuple(array.shape)
    lead = [len(scale)] + [1] * (len(seen.axes) - 1) if seen.axes else []
    rest = [size for axis, size in enumerate(shape) if axis not in seen.axes]
    scale = np.moveaxis(scale.reshape(*lead, *rest), range(len(seen.axes)), seen.axes)
    codes = from_matrix(codes, shape, seen.axes).astype(np.int8).astype(storage(bits))
    return Quantized(codes, scale.astype(np.float32), None, bits, seen.axes, divisor=divisor)


def divisors_of(statistics: Mapping[str, Statistics], power: float) -> dict[str, np.ndarray]:
    """{path: what its input's channels are divided by}: a power of each one's largest value, relative to the largest.

    By 1 all channels reach as far, on the images that were seen; others may go beyond. (SmoothQuant, Xiao et al. 2023,
    has weights in it, too, which GPTQ makes room for; AHCPTQ groups channels by their ranges.)
    """
    found = {}
    for path, seen in statistics.items():
        if seen.channels is not None and (reach := np.abs(seen.channels).max(0)).max() > 0:
            found[path] = (np.maximum(reach / reach.max(), LEAST_REACH) ** power).astype(np.float32)
    return found


def _divided(seen: Statistics, divisor: np.ndarray, shape: tuple[int, ...]) -> Statistics:
    """Statistics of the input divided; there is one group of inputs."""
    front = to_matrix(np.broadcast_to(divisor, shape), seen.axes)[:, 0].astype(np.float64)
    return dataclasses.replace(seen, moment=seen.moment / np.outer(front, front), mean=seen.mean / front)


def to_matrix(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """A parameter as [inputs, outputs]."""
    front = np.moveaxis(array, axes, range(len(axes)))
    return front.reshape(math.prod(front.shape[: len(axes)]), -1)


def from_matrix(matrix: np.ndarray, shape: tuple[int, ...], axes: Sequence[int]) -> np.ndarray:
    """Inverse of `to_matrix`."""
    rest = [size for axis, size in enumerate(shape) if axis not in axes]
    return np.moveaxis(matrix.reshape(*(shape[axis] for axis in axes), *rest), range(len(axes)), axes)


def _quantized(
    matrix: np.ndarray, moment: np.ndarray, bits: int, group: int, method: Method
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [inputs, outputs] and scales [groups, outputs] of a matrix."""
    low, high = levels(bits)
    count = len(matrix) // group if group and len(matrix) % group == 0 else 1
    pieces = matrix.reshape(count, -1, matrix.shape[1])
    largest = np.maximum(np.abs(pieces).max(1) / high, TINY)
    if method == "gptq":
        # Rounding to float32 at last must not move a scale that codes were made with.
        largest = largest.astype(np.float32).astype(np.float64)
        return gptq.search(matrix, moment, largest, (low, high), gptq.FACTORS if bits < 8 else gptq.FACTORS[:2])
    if method == "search":
        return _searched(pieces, moment, largest, (low, high))
    if method != "absmax":
        raise InputError(f"method {method!r:.20} is none of gptq, search, absmax")
    return np.clip(np.round(pieces / largest[:, None]), low, high).reshape(matrix.shape), largest


def _searched(
    pieces: np.ndarray, moment: np.ndarray, largest: np.ndarray, bounds: tuple[int, int], count: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """Each weight rounded by itself, with the scale whose error, weighted by its input's power, is least."""
    power = np.diag(moment).reshape(len(pieces), -1, 1)
    best = None
    for factor in np.linspace(1, 0.5, count):
        scale = largest * factor
        codes = np.clip(np.round(pieces / scale[:, None]), *bounds)
        error = (power * (codes * scale[:, None] - pieces) ** 2).sum(1)
        if best is None:
            best = codes, scale, error
            continue
        better = error < best[2]
        codes = np.where(better[:, None], codes, best[0])
        best = codes, np.where(better, scale, best[1]), np.where(better, error, best[2])
    return best[0].reshape(-1, pieces.shape[2]), best[1]
