"""Judges a graph of quantised inputs: its encoder where float32's rounding may choose a code, its decoder by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from converters.onnx.check import MAPS, OUTPUTS, Errors, Reference, largest_error
from slimsam_jax.errors import RunError

MEDIAN = 1e-5  # relative to the largest value; rounding gives 1e-7, a layer whose inputs have other codes 1e-3


class Limits(NamedTuple):
    """By how much an encoder's graph may differ from JAX, relative to the largest value, and in the median."""

    largest: float
    median: float


def limits_of(own: Reference, plain: Reference, least: float) -> Limits:
    """Limits by what quantising inputs changes.

    An input half a step from two codes gets one or the other by float32's rounding, and what follows may do so, too. So
    few values may differ by half of what quantising changes, and most by a twentieth: a graph that leaves it out
    differs by all, one that leaves one of 48 layers out by a seventh, if they cost alike.

    Args:
      own: of the model; `plain`: of that without codes of inputs.
      least: that any graph may differ by.
    """
    pairs = [(own.maps[name], plain.maps[name]) for name in own.maps]
    largest = max(largest_error(*pair) for pair in pairs)
    return Limits(max(least, largest / 2), max(MEDIAN, max(median_error(*pair) for pair in pairs) / 20))


def median_error(actual: np.ndarray, target: np.ndarray) -> float:
    """Returns the median of differences over the largest value."""
    return float(np.median(np.abs(actual - target)) / (np.abs(target).max() or 1))


class Apart:
    """An encoder as it is run, behind which a decoder is given JAX's maps: so each is judged by itself.

    Attributes:
      largest, median: differences of its own maps, relative to the largest value, the largest of all maps.
    """

    def __init__(self, encoder: Any, expected: Reference):
        self._encoder, self._maps = encoder, expected.maps
        self.largest = self.median = np.nan

    def run(self, names: Any, inputs: dict[str, Any]) -> list[np.ndarray]:
        (name,) = inputs
        found = self._encoder.run(names, inputs)
        wanted = [self._maps[MAPS[each]].transpose(2, 0, 1)[None] for each in OUTPUTS[name][: len(found)]]
        pairs = list(zip(found, wanted, strict=False))  # transformers.js's positions have no pair
        self.largest = max(largest_error(*pair) for pair in pairs)
        self.median = max(median_error(*pair) for pair in pairs)
        return [*wanted, *found[len(wanted) :]]

    def checked(self, errors: Errors, limits: Limits) -> Errors:
        """With the encoder's own error in the place of that of JAX's maps.

        Raises:
          RunError: more of its values differ than those that codes half a step away can move.
        """
        if not self.median <= limits.median:  # NaN, too
            raise RunError(
                f"the ONNX encoder differs from JAX: by {self.median:.1e} of the largest value in the median, where "
                f"rounding gives {limits.median:.1g} at most; nothing is written"
            )
        return errors._replace(embedding=self.largest)
