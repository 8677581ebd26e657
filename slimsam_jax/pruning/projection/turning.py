"""Arrays turned, scaled and summed along one group, wherever the group lies in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from slimsam_jax.pruning.structure import Structure, Widths, fold, length, names, pieces_of, unfold

Row = Sequence[Structure]
Change = Callable[[np.ndarray, int, tuple[str | int, ...]], np.ndarray]  # a piece, which axis, its axes


def along(
    array: np.ndarray, row: Row, group: str, widths: Widths, change: Change, only: Sequence[int] | None = None
) -> np.ndarray:
    """Changes every piece of an array along every axis that is the group.

    Args:
      array: of the shape of `row` at these widths.
      only: numbers of the axes to look at; all of them by default.
    """
    looked = [axis if only is None or i in only else length(axis, widths) for i, axis in enumerate(row)]
    pieces = []
    for piece, axes in zip(unfold(array, looked, widths), pieces_of(looked), strict=True):
        for i, name in enumerate(axes):
            if name == group:
                piece = change(piece, i, axes)
        pieces.append(piece)
    return fold(pieces, looked)


def turned(matrix: np.ndarray, copies: str | None = None) -> Change:
    """Turns by a matrix [r, m], or each of the copies that a group numbers by its own, [copies, r, m]."""

    def change(piece: np.ndarray, axis: int, axes: tuple[str | int, ...]) -> np.ndarray:
        if matrix.ndim == 2:
            return np.moveaxis(np.tensordot(matrix, piece, (1, axis)), 0, axis)
        number = axes.index(copies)
        flat = np.moveaxis(piece, (number, axis), (0, 1))
        result = matrix @ flat.reshape(*flat.shape[:2], -1)
        return np.moveaxis(result.reshape(*result.shape[:2], *flat.shape[2:]), (0, 1), (number, axis))

    return change


def scaled(vector: np.ndarray) -> Change:
    """Multiplies by a number per channel."""
    return lambda piece, axis, axes: piece * vector.reshape([-1 if i == axis else 1 for i in range(piece.ndim)])


def taken(indices: np.ndarray) -> Change:
    """Keeps some of the channels."""
    return lambda piece, axis, axes: piece.take(indices, axis)


def columns(
    array: Any, row: Row, group: str, widths: Widths, copies: str | None = None, only: Sequence[int] | None = None
) -> Iterator[Any]:
    """The pieces that have the group, each as [copies or 1, size, everything else].

    Args:
      array: numpy or JAX.
      copies: the group whose members are to stay apart.
      only: numbers of the axes in which the group is looked for.
    """
    wanted = lambda i, axis: (only is None or i in only) and group in names(axis)
    looked = [axis if wanted(i, axis) or copies in names(axis) else length(axis, widths) for i, axis in enumerate(row)]
    for piece, axes in zip(unfold(array, looked, widths), pieces_of(looked), strict=True):
        if group in axes:
            order = [axes.index(name) for name in (copies, group) if name in axes]
            order += [i for i in range(piece.ndim) if i not in order]
            sizes = [piece.shape[i] for i in order]
            first = sizes[0] if copies else 1
            yield piece.transpose(order).reshape(first, widths[group], math.prod(sizes) // first // widths[group])
