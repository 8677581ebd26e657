"""FastSAM's masks and prompts as ultralytics 8.4 makes them of the same network. numpy alone.

Written from a description in words and from arrays that it computed; none of its code was read (see
`models.fast_sam`). Detections are the same until here. Then boxes are scaled by a gain of each axis, masks are cut off
at boxes that the border rule has not moved, and prompts select whole masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from slimsam_jax.imaging.letterbox import Letterbox
from slimsam_jax.imaging.transforms import bilinear_matrix
from slimsam_jax.inference.fast_sam_masks import Masks, enlarged, windows_of
from slimsam_jax.inference.fast_sam_prompts import by_box

Size = tuple[int, int]
FINEST = 4  # by which prototypes are coarser than the frame


def to_image(boxes: np.ndarray, place: Letterbox, original: Size) -> np.ndarray:
    """Boxes [n, 4] of the frame in pixels of the image, (height, width), cut off at its border.

    Each axis has the gain of the scaled image, whose sides are whole numbers; the original has one for both.
    """
    gains = np.array([place.size[i] / original[i] for i in (1, 0)] * 2, boxes.dtype)
    scaled = (boxes - np.array([place.left, place.top] * 2, boxes.dtype)) / gains
    return np.clip(scaled, 0, np.array([original[1], original[0]] * 2, boxes.dtype))


def in_image(
    coefficients: np.ndarray, prototypes: np.ndarray, boxes: np.ndarray, place: Letterbox, shape: Size
) -> Masks:
    """Masks at the image's own size: logits enlarged until the grey bars are whole pixels, without them enlarged again.

    Args:
      coefficients: [n, m].
      prototypes: [h, w, m] of the frame.
      boxes: [n, 4] in pixels of the image.
      shape: (height, width) of the image.

    Raises:
      InputError: the masks would take too much memory; none has been asked for then.
    """
    windows = windows_of(boxes, shape)
    times, ends = finer(place), zip((place.top, place.left), place.size, strict=True)
    inner = [slice(start * times // FINEST, (start + side) * times // FINEST) for start, side in ends]
    matrices = [_twice(prototypes.shape[i], times, inner[i], shape[i]) for i in (0, 1)]
    return enlarged(coefficients, prototypes, windows, *matrices)


def in_frame(coefficients: np.ndarray, prototypes: np.ndarray, boxes: np.ndarray, place: Letterbox) -> Masks:
    """Masks at the frame's size, bars and all, cut off sharply at the boxes [n, 4] in pixels of the frame."""
    windows = windows_of(boxes, place.frame)
    return enlarged(coefficients, prototypes, windows, *map(bilinear_matrix, prototypes.shape[:2], place.frame))


def finer(place: Letterbox) -> int:
    """By how much prototypes are enlarged for the image within its bars to be of whole pixels: 1, 2 or 4."""
    ends = (place.top, place.left, place.top + place.size[0], place.left + place.size[1])
    return next(times for times in (1, 2, FINEST) if not any(end * times % FINEST for end in ends))


def _twice(source: int, times: int, inner: slice, target: int) -> scipy.sparse.csr_array:
    """An axis enlarged `times`, and what is `inner` of that to `target`: one matrix, [target, source]."""
    first = bilinear_matrix(source, times * source)[inner]
    return scipy.sparse.csr_array(bilinear_matrix(first.shape[0], target) @ first)


def select(
    masks: Masks, points: np.ndarray | None, labels: Sequence[int], boxes: Sequence[Sequence[float]] = ()
) -> list[int]:
    """Selects whole masks by prompts: those that any of them means, best first.

    Args:
      masks: of the image's size.
      points: [n, 2] (x, y) in pixels of the image, outside of which the nearest pixel counts; or None. They mean the
        masks with any point of label 1 and none of label 0; without any of label 1 all but those with one of label 0.
      labels: [n] 1 or 0.
      boxes: [n, 4] x0, y0, x1, y1. Each means the mask of the largest IoU with it.
    """
    found = {by_box(masks, box, masks.shape) for box in boxes} - {None}
    if points is None or not len(points):
        return sorted(found)
    most = np.array(masks.shape[::-1]) - 1
    places = np.clip(np.asarray(points, float).astype(int), 0, most)
    held = np.array([masks.holds(x, y) for x, y in places]).reshape(len(places), len(masks))
    positive = np.asarray(labels) == 1
    on = held[positive].any(0) if positive.any() else np.ones(len(masks), bool)
    return sorted(found | {int(i) for i in np.flatnonzero(on & ~held[~positive].any(0))})
