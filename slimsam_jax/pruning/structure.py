"""What an axis of an array is made of, as data, and arrays taken apart along it.

A structure is the name of a group (its channels, all of them, in order), a number (so many
indices that nothing may cut), or a product or a sum of structures. An array is *unfolded*
when it is reshaped along products and split along sums, so that each axis of each piece is
one group or one number: the form in which importance, masks and the cut know an axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError


class Product(NamedTuple):
    """Axes merged by a row-major reshape."""

    parts: tuple[Structure, ...]


class Sum(NamedTuple):
    """Axes concatenated."""

    parts: tuple[Structure, ...]


Structure = str | int | Product | Sum
Widths = Mapping[str, int]  # group name -> channels


def length(structure: Structure, widths: Widths) -> int:
    """The length of an axis whose groups have these widths."""
    if isinstance(structure, str):
        return widths[structure]
    if isinstance(structure, int):
        return structure
    lengths = [length(part, widths) for part in structure.parts]
    return math.prod(lengths) if isinstance(structure, Product) else sum(lengths)


def shape_of(axes: Sequence[Structure], widths: Widths) -> tuple[int, ...]:
    return tuple(length(axis, widths) for axis in axes)


def names(structure: Structure) -> tuple[str, ...]:
    """The groups in it, each as often as it occurs."""
    if isinstance(structure, str):
        return (structure,)
    return () if isinstance(structure, int) else tuple(name for part in structure.parts for name in names(part))


def renamed(structure: Structure, new: Mapping[str, str]) -> Structure:
    """The same of groups by their new names, {name: new name} of all."""
    if isinstance(structure, str):
        return new[structure]
    if isinstance(structure, int):
        return structure
    return type(structure)(tuple(renamed(part, new) for part in structure.parts))


def position(structure: Structure, index: int, full: Widths, widths: Widths) -> int:
    """Where a cut along the axis lies once its groups have shrunk from `full` to `widths`.

    The index is a boundary between two parts; inside a group there is none but its ends.
    """
    if index == 0:
        return 0
    if isinstance(structure, Sum):
        before = 0
        for part in structure.parts:
            if index < length(part, full):
                return before + position(part, index, full, widths)
            index, before = index - length(part, full), before + length(part, widths)
        return before
    if isinstance(structure, Product):
        first, rest = structure.parts[0], Product(structure.parts[1:])
        count, within = divmod(index, length(rest, full))
        return position(first, count, full, widths) * length(rest, widths) + position(rest, within, full, widths)
    return index if isinstance(structure, int) else widths[structure]


def to_json(structure: Structure) -> Any:
    if isinstance(structure, str | int):
        return structure
    kind = "product" if isinstance(structure, Product) else "sum"
    return {kind: [to_json(part) for part in structure.parts]}


def from_json(data: Any, deepest: int = 50) -> Structure:
    """Raises InputError for what `to_json` does not write."""
    if isinstance(data, str) or (isinstance(data, int) and not isinstance(data, bool) and data >= 0):
        return data
    if isinstance(data, dict) and len(data) == 1 and deepest:
        ((kind, parts),) = data.items()
        if kind in ("product", "sum") and isinstance(parts, list) and len(parts) > 1:
            parts = tuple(from_json(part, deepest - 1) for part in parts)
            return Product(parts) if kind == "product" else Sum(parts)
    raise InputError(f"{data!r} is no structure of an axis: a group's name, a length, a product or a sum")


def count_pieces(axes: Sequence[Structure]) -> int:
    """How many pieces `pieces_of` would list."""
    return math.prod(map(_count, axes))


def _count(axis: Structure) -> int:
    if isinstance(axis, str | int):
        return 1
    counts = [_count(part) for part in axis.parts]
    return math.prod(counts) if isinstance(axis, Product) else sum(counts)


def pieces_of(axes: Sequence[Structure]) -> list[tuple[str | int, ...]]:
    """The axes of every piece of an unfolded array, in the order of `unfold`."""
    for i, axis in enumerate(axes):
        if isinstance(axis, Product):
            return pieces_of((*axes[:i], *axis.parts, *axes[i + 1 :]))
        if isinstance(axis, Sum):
            return [piece for part in axis.parts for piece in pieces_of((*axes[:i], part, *axes[i + 1 :]))]
    return [tuple(axes)]


def unfold(array: Any, axes: Sequence[Structure], widths: Widths) -> list[Any]:
    """Takes an array apart.

    Args:
      array: numpy or JAX, of the shape of `axes`.
      axes: [rank] structures.
      widths: of the groups at present.

    Returns:
      pieces, each with one axis per group or number; `pieces_of` says which.
    """
    for i, axis in enumerate(axes):
        if isinstance(axis, Product):
            axes = (*axes[:i], *axis.parts, *axes[i + 1 :])
            return unfold(array.reshape(shape_of(axes, widths)), axes, widths)
        if isinstance(axis, Sum):
            ends = np.cumsum([0, *(length(part, widths) for part in axis.parts)])
            parts = [array[(slice(None),) * i + (slice(*ends[k : k + 2]),)] for k in range(len(axis.parts))]
            split = [(*axes[:i], part, *axes[i + 1 :]) for part in axis.parts]
            return [piece for part, own in zip(parts, split, strict=True) for piece in unfold(part, own, widths)]
    return [array]


def fold(pieces: Sequence[Any], axes: Sequence[Structure]) -> Any:
    """The inverse of `unfold`, of pieces that may have shrunk."""
    return _fold(iter(pieces), tuple(axes))


def _fold(pieces: Iterator[Any], axes: tuple[Structure, ...]) -> Any:
    for i, axis in enumerate(axes):
        if isinstance(axis, Product):
            array = _fold(pieces, (*axes[:i], *axis.parts, *axes[i + 1 :]))
            merged = math.prod(array.shape[i : i + len(axis.parts)])
            return array.reshape((*array.shape[:i], merged, *array.shape[i + len(axis.parts) :]))
        if isinstance(axis, Sum):
            parts = [_fold(pieces, (*axes[:i], part, *axes[i + 1 :])) for part in axis.parts]
            concatenate = np.concatenate if all(isinstance(part, np.ndarray) for part in parts) else jnp.concatenate
            return concatenate(parts, axis=i)
    return next(pieces)
