"""What was kept to make a tree: known by its very arrays, or else by its shapes if no other cut has led to them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from slimsam_jax.pruning.groups import Keep


class Made:
    """The trees that were cut. Arrays are held weakly; under `jax.jit`, or trained, a tree has its shapes alone."""

    def __init__(self):
        self._by_shapes: dict[tuple, Keep | None] = {}  # None: of two cuts with these shapes
        self._by_array: dict[int, tuple[weakref.ref, Keep]] = {}

    def remember(self, arrays: Mapping[str, Any], new: Mapping[str, Any], keep: Keep) -> None:
        """Notes what was kept.

        Args:
          arrays: the tree, by path.
          new: those of its arrays that the cut has made; those that it left alone lie in the trees of other cuts, too.
        """
        before = self._by_shapes.setdefault(_shapes(arrays), keep)
        if before is not None and not _same(before, keep):
            self._by_shapes[_shapes(arrays)] = None
        for array in new.values():
            number = id(array)
            forget = lambda _, number=number: self._by_array.pop(number, None)
            self._by_array[number] = weakref.ref(array, forget), keep

    def keep_of(self, arrays: Mapping[str, Any]) -> Keep | None:
        """What was kept to make this tree, if that is known beyond doubt."""
        known = [self._by_array[id(array)][1] for array in arrays.values() if id(array) in self._by_array]
        if known and all(keep is known[0] for keep in known):
            return known[0]
        return self._by_shapes.get(_shapes(arrays))


def _shapes(arrays: Mapping[str, Any]) -> tuple:
    return tuple((path, tuple(array.shape)) for path, array in arrays.items())


def _same(a: Keep, b: Keep) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
