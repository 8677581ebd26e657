"""Integers as arrays of a file and their description as JSON, both ways.

In the place of `path` the file has its codes (int8, or packed bits, uint8), beside it `path_scale`, `path_range` if the
layer's input is quantised, and `path_divisor` if its channels are divided first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from slimsam_jax.errors import InputError, printable
from slimsam_jax.quantization.codes import Quantized, is_quantized, levels, pack, packed_size, unpack

SCALE, RANGE, DIVISOR = "_scale", "_range", "_divisor"
LARGEST = float(np.finfo(np.float32).max)  # codes times their scale stay below it


def to_arrays(flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{path: array or integers} -> what a file holds."""
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in flat.items():
        if not is_quantized(leaf):
            arrays[path] = np.asarray(leaf)
            continue
        arrays[path] = pack(np.asarray(leaf.codes), leaf.bits)
        arrays[path + SCALE] = np.asarray(leaf.scale)
        if leaf.range is not None:
            arrays[path + RANGE] = np.asarray(leaf.range)
        if leaf.divisor is not None:
            arrays[path + DIVISOR] = np.asarray(leaf.divisor)
    return arrays


def describe(flat: Mapping[str, Any]) -> list[dict[str, Any]]:
    """JSON of the integers of a flat tree: a dict for all that are alike, with their paths; [] if there are none."""
    kinds: dict[tuple, dict[str, Any]] = {}
    for path, leaf in flat.items():
        if is_quantized(leaf):
            fields = {
                "bits": leaf.bits,
                "axes": list(leaf.axes),
                "inputs": 0 if leaf.range is None else leaf.input_bits,
            }
            fields |= {"integer": leaf.integer} | ({} if leaf.divisor is None else {"divided": True})
            kinds.setdefault(tuple(map(str, fields.values())), {**fields, "arrays": []})["arrays"].append(path)
    return list(kinds.values())


class Described:
    """The integers of a file, by their description.

    Args:
      where: what to call it in error messages.

    Raises:
      InputError, or whatever foreign JSON leads to: it is none.
    """

    def __init__(self, kinds: Any, where: str):
        self._fields: dict[str, dict[str, Any]] = {}
        self.where = where
        for kind in kinds:
            levels(kind["bits"], f"{where}: ")
            fields = {name: kind[name] for name in ("bits", "axes", "inputs", "integer")}
            fields["divided"] = kind.get("divided", False)  # files of 1.0 say nothing of it
            whole = type(fields["inputs"]) is int and fields["inputs"] in (0, *range(3, 9))
            if not whole or type(fields["integer"]) is not bool or type(fields["divided"]) is not bool:
                raise InputError(f"{where}: its quantization speaks of inputs that there are not")
            paths = kind["arrays"]
            if not isinstance(paths, list) or any(type(path) is not str for path in paths):
                raise InputError(f"{where}: its quantization must list the names of its arrays")
            self._fields |= dict.fromkeys(paths, fields)

    @property
    def paths(self) -> set[str]:
        return set(self._fields)

    @property
    def extra(self) -> set[str]:
        """Names of arrays beside those of the parameters."""
        ranges = {path + RANGE for path, fields in self._fields.items() if fields["inputs"]}
        divisors = {path + DIVISOR for path, fields in self._fields.items() if fields["divided"]}
        return {path + SCALE for path in self._fields} | ranges | divisors

    def restore(self, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The integers of a file that has all arrays of `paths` and `extra`.

        Args:
          shapes: of all parameters.

        Raises:
          InputError: an array of the wrong type or size, or a scale that is no positive number.
        """
        return {path: self._one(path, arrays, tuple(shapes[path])) for path in self._fields}

    def _one(self, path: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> Quantized:
        fields, codes, scale = self._fields[path], arrays[path], arrays[path + SCALE]
        bits, axes, name = fields["bits"], tuple(fields["axes"]), f"{self.where}: {printable(path, 100)}"
        fits = codes.dtype == (np.int8 if bits == 8 else np.uint8)
        fits &= codes.shape == (shape if bits == 8 else (packed_size(math.prod(shape), bits),))
        if not fits or not _scales_fit(scale, shape, axes):
            raise InputError(f"{name} does not hold integers of {bits} bits for an array of {shape}")
        span = arrays[path + RANGE] if fields["inputs"] else None
        if span is not None and not _is_range(span, fields["inputs"]):
            raise InputError(f"{name} has a range that is none")
        divisor = arrays[path + DIVISOR] if fields["divided"] else None
        if divisor is not None and not _divides(divisor, scale, shape, axes):
            raise InputError(f"{name} has a divisor that is none")
        # Of the right size now: views no more.
        scale, span, divisor = (None if array is None else np.array(array) for array in (scale, span, divisor))
        how = bits, axes, fields["inputs"] or 8, fields["integer"], divisor
        return Quantized(unpack(codes, bits, shape), scale, span, *how)


def _scales_fit(scale: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether scales are of an array's shape, see `Quantized`, and then whether they are positive and not too large."""
    if any(type(axis) is not int for axis in axes) or list(axes) != sorted({*axes} & {*range(len(shape))}):
        return False
    if scale.ndim != len(shape) or scale.dtype != np.float32:
        return False
    own = [size for axis, size in enumerate(scale.shape) if axis not in axes[:1]]
    expected = [1 if axis in axes else shape[axis] for axis in range(len(shape)) if axis not in axes[:1]]
    summed = math.prod(shape[axis] for axis in axes)
    groups = scale.shape[axes[0]] if axes else 1
    if own != expected or not 0 < groups <= max(summed, 1) or summed % groups:
        return False
    return bool(((scale > 0) & (scale < LARGEST / 128)).all())


def _divides(divisor: np.ndarray, scale: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether an array is a divisor, see `Quantized`: positive, and no weight becomes too large by it."""
    window = len(shape) == 4  # of a convolution, all of which a channel's number is for
    channels = {2} if window else {*axes}
    sizes = tuple(size if axis in channels else 1 for axis, size in enumerate(shape))
    if divisor.dtype != np.float32 or divisor.shape != sizes or not divisor.size:
        return False
    if not np.isfinite(divisor).all() or not (divisor > 0).all():
        return False
    return float(scale.max(initial=0)) * 128 / float(divisor.min()) < LARGEST


def _is_range(span: np.ndarray, bits: int) -> bool:
    if span.dtype != np.float32 or span.shape not in ((0,), (2,), (3,)) or not np.isfinite(span).all():
        return False
    if span.size == 0:
        return True
    if span.size == 3:
        return bool((span[[0, 2]] > 0).all() and (span[[0, 2]] < LARGEST / 2**bits).all() and span[1] == 0)
    return 0 < span[0] < LARGEST / 2**bits and span[1] == np.round(span[1]) and 0 <= span[1] < 2**bits
