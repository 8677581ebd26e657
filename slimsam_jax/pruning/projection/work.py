"""A tree of parameters while it is projected, group by group, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import Tree, by_path, path_of
from slimsam_jax.pruning.projection.layout import Layout
from slimsam_jax.pruning.projection.moments import Moments, Question, capture
from slimsam_jax.pruning.projection.states import Reading
from slimsam_jax.pruning.projection.turning import Change, along


class Work:
    """What the steps of a projection share.

    Attributes:
      grouping, layout: of the function.
      arrays: {path: float64}, cut so far.
      widths, keep: what is left of each group.
    """

    def __init__(self, params: Tree, grouping: Grouping, layout: Layout, batches: Sequence[Sequence[Any]]):
        self.grouping, self.layout = grouping, layout
        self._params, self._batches = params, batches
        self._types = {path: leaf.dtype for path, leaf in by_path(params).items()}
        self.arrays = {
            path: np.asarray(leaf, np.float64) for path, leaf in by_path(params).items() if path in grouping.axes
        }
        self.widths, self.keep = dict(grouping.widths), {}

    def tree(self) -> Tree:
        """The parameters, numpy, of the types that they had."""

        def leaf(keys: tuple, before: Any) -> np.ndarray:
            path = path_of(keys)
            return self.arrays[path].astype(self._types[path]) if path in self.arrays else np.asarray(before)

        return jax.tree_util.tree_map_with_path(leaf, self._params)

    def capture(self, questions: set[Question]) -> dict[Question, Moments]:
        if not questions:
            return {}
        return capture(self.grouping, self.keep, jax.tree.leaves(self.tree()), self._batches, questions)

    def change(self, path: str, group: str, how: Change, only: Sequence[int] | None = None) -> None:
        """Changes an array along a group."""
        self.arrays[path] = along(self.arrays[path], self.grouping.axes[path], group, self.widths, how, only)

    def kept(self, group: str, indices: np.ndarray) -> None:
        self.keep[group] = indices
        self.widths[group] = len(indices)

    def bias_of(self, reading: Reading) -> str | None:
        """The bias behind a kernel, if it has a number for each that the kernel makes."""
        path = self.layout.bias_of(reading.step, 1 - reading.position)
        if path is None or not reading.axes or self.layout.uses[reading.kernel] > 1:
            return None
        kernel = self.arrays[reading.kernel].shape
        made = math.prod(size for i, size in enumerate(kernel) if i not in reading.axes)
        return path if self.arrays[path].size == made else None

    def add_to_bias(self, reading: Reading, change: np.ndarray) -> None:
        """Adds [everything that the kernel makes]."""
        path = self.bias_of(reading)
        self.arrays[path] = self.arrays[path] + change.reshape(self.arrays[path].shape)


def contracted(reading: Reading) -> tuple[int, ...]:
    """The axes of the operand along which is summed, in the order of `reading.axes`."""
    params = reading.step.eqn.params
    if reading.step.name == "dot_general":
        return tuple(params["dimension_numbers"][0][reading.position])
    return (params["dimension_numbers"].lhs_spec[1],)


def sum_over(kernel: np.ndarray, axes: Sequence[int], mean: np.ndarray) -> np.ndarray:
    """What a kernel makes of the mean operand."""
    return np.tensordot(kernel, mean, (axes, range(mean.ndim)))
