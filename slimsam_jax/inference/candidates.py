"""Candidate masks of an image: enlarged, measured and packed to bits on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.inference.decode import Encoded, padded
from slimsam_jax.models.sam import Sam

FRAME = 256  # images are enlarged into frames of multiples of this, so that few sizes are compiled


class Candidates(NamedTuple):
    """n masks on an image.

    Attributes:
      bits: [n, h, ceil(w / 8)] uint8, rows of their crop, packed.
      boxes: [n, 4] x0, y0, x1, y1 in the image's frame, all within the mask.
      areas: [n] pixels.
      predicted_iou, stability: [n].
      points: [n, 2] (x, y), what was asked.
      crop_boxes: [n, 4], x1 and y1 just outside.
    """

    bits: list[np.ndarray]
    boxes: np.ndarray
    areas: np.ndarray
    predicted_iou: np.ndarray
    stability: np.ndarray
    points: np.ndarray
    crop_boxes: np.ndarray

    def take(self, index: np.ndarray) -> Candidates:
        return Candidates([self.bits[i] for i in index], *(array[index] for array in self[1:]))


def concatenate(parts: Sequence[Candidates]) -> Candidates:
    bits = [mask for part in parts for mask in part.bits]
    return Candidates(bits, *(np.concatenate(arrays) for arrays in zip(*(part[1:] for part in parts), strict=True)))


def enlarge(sam: Sam, encoded: Encoded, low: np.ndarray, offset: float = 1.0, threshold: float = 0.0):
    """Enlarges logits to the image's frame, measures the masks, and packs them.

    Args:
      low: [n, 4h, 4w] logits.
      offset: of stability.
      threshold: a mask is where logits exceed it.

    Returns:
      bits [n, h0, ceil(w0 / 8)], boxes [n, 4] (zeros of an empty mask), areas [n], stability [n] (0 of an empty one).
    """
    height, width = encoded.original_size
    frame = tuple(-(-side // FRAME) * FRAME for side in encoded.original_size)
    rows, columns = (_matrix(sam, encoded, axis, frame[axis]) for axis in (0, 1))
    parts = []
    for index, count in padded(len(low)):
        outputs = _enlarge(low[index], rows, columns, np.array(encoded.original_size), threshold, offset)
        parts.append([np.asarray(array)[:count] for array in outputs])
    if not parts:
        empty = np.zeros((0, height, -(-width // 8)), np.uint8), np.zeros((0, 4), int)
        return *empty, np.zeros(0, int), np.zeros(0)
    bits, boxes, areas, inner, outer = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return bits[:, :height, : -(-width // 8)], boxes, areas, inner / np.maximum(outer, 1)


def _matrix(sam: Sam, encoded: Encoded, axis: int, frame: int) -> np.ndarray:
    """Returns the weights of one axis, [frame, 4h or 4w], zero beyond the image."""
    source, side = 4 * sam.config.grid[axis], encoded.original_size[axis]
    weights = sam.config.frame.mask_matrix(axis, source, encoded.size[axis], side)
    return np.pad(weights.toarray(), ((0, frame - side), (0, 0)))


@jax.jit
def _enlarge(low, rows, columns, size, threshold, offset):
    with jax.default_matmul_precision("highest"):  # edges of masks bear no rounding
        logits = jnp.einsum("yi,nij,xj->nyx", rows, low, columns)
    inside = (jnp.arange(len(rows)) < size[0])[:, None] & (jnp.arange(len(columns)) < size[1])
    # Of packed bits: on a CPU four times as fast as to add up booleans, which is most of the time spent here.
    count = lambda mask: jax.lax.population_count(jnp.packbits(mask, axis=-1)).sum((1, 2), dtype=jnp.int32)
    mask = (logits > threshold) & inside
    boxes = jnp.stack([_edge(mask.any(1)), _edge(mask.any(2)), _edge(mask.any(1), True), _edge(mask.any(2), True)], 1)
    inner, outer = (count((logits > threshold + sign * offset) & inside) for sign in (1, -1))
    return jnp.packbits(mask, axis=-1), boxes, count(mask), inner, outer


def _edge(used: jax.Array, last: bool = False) -> jax.Array:
    """Returns the first or last true index of each row, [n, side] bool -> [n]; 0 if there is none."""
    if last:
        return jnp.where(used.any(1), used.shape[1] - 1 - used[:, ::-1].argmax(1), 0)
    return used.argmax(1)


def unpack(candidates: Candidates, index: int, size: tuple[int, int]) -> np.ndarray:
    """Unpacks a mask into the whole image, [h0, w0] bool."""
    x0, y0, x1, y1 = candidates.crop_boxes[index]
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = np.unpackbits(candidates.bits[index], axis=-1, count=x1 - x0)
    return mask
