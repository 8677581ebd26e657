"""How an embedding lies in a file of the teacher's cache: in half precision, or in integers with a range a channel."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from slimsam_jax.models.sam import Embedding

Precision = Literal["float16", "int8"]
RANGE = np.dtype("<f4")  # of the middle and the step of a channel
LEVELS = 254  # steps from the least value of a channel to the largest


class Layout(NamedTuple):
    """The array that is stored for an image.

    Attributes:
      shapes: of the embedding, an array's or a dict of maps', [h, w, C] each.
      precision: "float16"; or "int8", one byte a number, and a middle and a step of 4 bytes each a channel.
    """

    shapes: Any
    precision: Precision

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.precision)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one map in half precision its own, else all numbers after each other."""
        if self.precision == "float16" and hasattr(self.shapes, "shape"):
            return tuple(self.shapes.shape)
        return (sum(map(self._numbers, jax.tree.leaves(self.shapes))),)

    @property
    def bytes(self) -> int:
        """Of an image, but for the file's header."""
        return math.prod(self.shape) * self.dtype.itemsize

    def packed(self, embedding: Embedding) -> np.ndarray:
        """What is stored: an array of `shape` and `dtype`."""
        maps = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(embedding)]
        if self.precision == "float16":
            return np.concatenate([x.astype(np.float16).ravel() for x in maps]).reshape(self.shape)
        return np.concatenate([_integers(x) for x in maps])

    def unpacked(self, stored: np.ndarray) -> Embedding:
        """The embedding in half precision, as the encoder gives it: an array or a dict of maps."""
        leaves, tree = jax.tree.flatten(self.shapes)
        parts = np.split(stored.ravel(), np.cumsum([self._numbers(leaf) for leaf in leaves])[:-1])
        if self.precision == "float16":
            maps = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        else:
            maps = [_numbers(part, leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, maps)

    def _numbers(self, leaf: Any) -> int:
        """Elements of the stored array that a map takes."""
        ranges = 2 * RANGE.itemsize * leaf.shape[-1] if self.precision == "int8" else 0
        return math.prod(leaf.shape) + ranges


def _integers(values: np.ndarray) -> np.ndarray:
    """[h, w, C] -> int8: the bytes of the channels' middles and steps [2, C], then their numbers."""
    least, largest = (reduce(values, axis=(0, 1)).astype(np.float64) for reduce in (np.min, np.max))
    ranges = np.stack([(least + largest) / 2, (largest - least) / LEVELS]).astype(RANGE)
    middle, step = ranges.astype(np.float32)
    numbers = np.rint((values - middle) / np.where(step > 0, step, 1))
    return np.concatenate([ranges.ravel().view(np.int8), np.clip(numbers, -127, 127).astype(np.int8).ravel()])


def _numbers(stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `_integers`, [h, w, C] float16."""
    size = 2 * RANGE.itemsize * shape[-1]
    middle, step = np.ascontiguousarray(stored[:size]).view(RANGE).reshape(2, shape[-1]).astype(np.float32)
    return (stored[size:].reshape(shape) * step + middle).astype(np.float16)
