"""Judges a graph of quantised inputs: its encoder where float32's rounding may choose a code, its decoder by itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.onnx.check import MAPS, OUTPUTS, Errors, Reference, largest_error
from slimsam_jax.errors import RunError

MEDIAN = 1e-5  # relative to the largest value; rounding gives 1e-7, a layer whose inputs have other codes 1e-3


def limit_of(own: Reference, plain: Reference, least: float) -> float:
    """By how much the encoder's graph may differ from JAX, relative to the largest value.

    An input half a step from two codes gets one or the other by float32's rounding, and what follows may do so, too. So
    few values may differ by half of what quantising inputs changes: a graph that leaves it out differs by all.

    Args:
      own: of the model; `plain`: of that without codes of inputs.
      least: that any graph may differ by.
    """
    return max(least, *(largest_error(own.maps[name], plain.maps[name]) / 2 for name in own.maps))


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
        self.median = max(float(np.median(np.abs(own - jax)) / (np.abs(jax).max() or 1)) for own, jax in pairs)
        return [*wanted, *found[len(wanted) :]]

    def checked(self, errors: Errors) -> Errors:
        """With the encoder's own error in the place of that of JAX's maps.

        Raises:
          RunError: more of its values differ than those that codes half a step away can move.
        """
        if not self.median <= MEDIAN:  # NaN, too
            raise RunError(
                f"the ONNX encoder differs from JAX: by {self.median:.1e} of the largest value in the median, where "
                f"rounding gives {MEDIAN:g} at most; nothing is written"
            )
        return errors._replace(embedding=self.largest)
