"""Captures what a function's layers see of a calibration set: second moments, means and ranges of their inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.quantization.layers import Function, Layer, find_layers
from slimsam_jax.tracing.program import bind

Sums = dict[int, dict[str, Any]]  # number of a layer -> what is summed over batches


@dataclasses.dataclass(frozen=True)
class Range:
    """What the values of a layer's input lie between.

    Attributes:
      low, high: the extremes of all batches.
      percentiles: {99.9: (low, high)}: the means over batches of what this share of either side lies within.
    """

    low: float
    high: float
    percentiles: dict[float, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of a parameter's layers.

    Attributes:
      axes: of the parameter, those that the layers sum over.
      group_of: [outputs] which group of inputs an output channel reads, see `Layer`.
      moment: [groups, inputs, inputs] float64, the mean of x x^T over tokens.
      mean: [groups, inputs] float64, of x.
      tokens: that the means are over.
      range: of the values of x.
      channels: [2, ...] their least and greatest, one by one, see `Layer.extremes`; None where that is.
    """

    axes: tuple[int, ...]
    group_of: np.ndarray
    moment: np.ndarray
    mean: np.ndarray
    tokens: int
    range: Range
    channels: np.ndarray | None = None


def capture(
    function: Callable, params: Any, batches: Iterable[Sequence[Any]], percentiles: Sequence[float] = ()
) -> dict[str, Statistics]:
    """Runs a function on data and notes what its layers see. Its code is not touched.

    A parameter of several layers that sum over the same axes has their statistics together; a layer that sums over
    other axes than the first one of its parameter is left out, as are layers inside of loops and branches.

    Args:
      function: of (params, *inputs), without loops around its layers.
      params: a tree of arrays.
      batches: each a tuple of the function's inputs, all of the same shapes.
      percentiles: that ranges have besides their extremes, above 50: 99.9 leaves out a thousandth at either end.

    Returns:
      {path of a parameter: its statistics}.

    Raises:
      InputError: there are no batches, or an input has values that are not finite.
    """
    found, watch, sums, count = None, None, None, 0
    for inputs in batches:
        if found is None:
            found = find_layers(function, params, *inputs)
            watch = jax.jit(functools.partial(_watch, found, _numbers(found), tuple(percentiles)))
            shapes = list(map(np.shape, jax.tree.leaves(inputs)))
        elif (others := list(map(np.shape, jax.tree.leaves(inputs)))) != shapes:
            raise InputError(f"a batch has inputs of shapes {others}, and the first one's are {shapes}: drop the last")
        seen = jax.device_get(watch(jax.tree.leaves((params, *inputs))))
        sums, count = _joined(sums, seen), count + 1
    if sums is None:
        raise InputError("there are no images to calibrate with")
    numbers = _numbers(found)
    chosen = _chosen(found).items()
    return {path: _statistics(path, layers, numbers, sums, percentiles, count) for path, layers in chosen}


def _chosen(found: Function) -> dict[str, list[Layer]]:
    """The layers of each parameter that sum over the axes of its first one."""
    chosen: dict[str, list[Layer]] = {}
    for layer in found.layers:
        others = chosen.setdefault(layer.path, [])
        if not others or _alike(layer, others[0]):
            others.append(layer)
    return chosen


def _alike(a: Layer, b: Layer) -> bool:
    return a.axes == b.axes and np.array_equal(a.group_of, b.group_of)


def _numbers(found: Function) -> dict[Layer, int]:
    """A number for each layer, the same for layers that see the same (q, k and v, say): their moments are one."""
    known: dict[tuple, int] = {}
    numbers = {}
    for layer in found.layers:
        kernel = layer.step.eqn.invars[layer.side].aval.shape
        window = kernel if layer.step.name == "conv_general_dilated" else ()
        key = layer.source, layer.side, str(layer.step.eqn.params), tuple(layer.order), window[:-1]
        key += layer.axes, len(layer.shape)  # extremes have the parameter's shape
        numbers[layer] = known.setdefault(key, len(known))
    return numbers


def _watch(
    found: Function, numbers: Mapping[Layer, int], percentiles: tuple[float, ...], leaves: Sequence[Any]
) -> Sums:
    """Sums over one batch, by the numbers of the layers."""
    seen: Sums = {}

    def product(layer: Layer, operands: list[Any]) -> Any:
        if numbers[layer] not in seen:
            seen[numbers[layer]] = _noted(layer, operands[1 - layer.side], percentiles)
        (result,) = bind(layer.step.eqn, operands, layer.step.eqn.params)
        return result

    found.run(leaves, product)
    return seen


def _noted(layer: Layer, array: Any, percentiles: tuple[float, ...]) -> dict[str, jax.Array]:
    columns = layer.columns(array).astype(jnp.float32)
    noted = {
        "moment": jnp.einsum("gti,gtj->gij", columns, columns, precision="highest"),
        "mean": columns.sum(1),
        "tokens": jnp.array(columns.shape[1]),
        "low": array.min(),
        "high": array.max(),
    }
    if (extremes := layer.extremes(array)) is not None:
        noted |= {"least": extremes[0], "greatest": extremes[1]}
    if percentiles:
        shares = jnp.array([[1 - p / 100, p / 100] for p in percentiles])
        noted["percentiles"] = jnp.quantile(array.astype(jnp.float32), shares.ravel()).reshape(-1, 2)
    return noted


def _joined(sums: Sums | None, seen: Sums) -> Sums:
    """Sums of all batches so far, in float64; of the ranges the widest."""
    seen = {n: {k: np.asarray(v, np.float64) for k, v in each.items()} for n, each in seen.items()}
    if sums is None:
        return seen
    how = {"low": np.minimum, "high": np.maximum, "least": np.minimum, "greatest": np.maximum}
    return {n: {k: how.get(k, np.add)(sums[n][k], each[k]) for k in each} for n, each in seen.items()}


def _statistics(
    path: str,
    layers: Sequence[Layer],
    numbers: Mapping[Layer, int],
    sums: Sums,
    percentiles: Sequence[float],
    count: int,
) -> Statistics:
    """Those of a parameter: the means over all its layers' tokens."""
    each = [sums[n] for n in dict.fromkeys(numbers[layer] for layer in layers)]
    low, high = min(one["low"] for one in each), max(one["high"] for one in each)
    if not np.isfinite([low, high]).all():
        raise InputError(f"the input of {path} has values that are not finite: it cannot be calibrated")
    shares = np.mean([one["percentiles"] for one in each], 0) / count if percentiles else ()
    within = {p: (float(a), float(b)) for p, (a, b) in zip(percentiles, shares, strict=True)}
    tokens = sum(one["tokens"] for one in each)
    moment, mean = (sum(one[name] for one in each) / tokens for name in ("moment", "mean"))
    span = Range(float(low), float(high), within)
    channels = None
    if all("least" in one for one in each):
        channels = np.stack([np.min([one["least"] for one in each], 0), np.max([one["greatest"] for one in each], 0)])
    return Statistics(layers[0].axes, layers[0].group_of, moment, mean, int(tokens), span, channels)
