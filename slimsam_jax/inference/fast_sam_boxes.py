"""FastSAM's boxes: suppression of what overlaps, the border rule, and the way back into the image. numpy alone.

Boxes are x0, y0, x1, y1 in pixels, real numbers. The *frame* is what the network sees: the image scaled, in the middle
of grey bars (`imaging.letterbox`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from slimsam_jax.errors import RunError
from slimsam_jax.imaging.letterbox import Letterbox

MOST_CANDIDATES = 30_000  # the best so many are looked at
BORDER = 20  # pixels of the frame
FULL = 0.9  # IoU with the frame, from which a box is taken for all of it


class Detections(NamedTuple):
    """n detections, the best first.

    Attributes:
      boxes: [n, 4] in pixels of the frame.
      scores: [n] in 0..1.
      coefficients: [n, m].
      cells: [n], which of the network's cells each comes from.
    """

    boxes: np.ndarray
    scores: np.ndarray
    coefficients: np.ndarray
    cells: np.ndarray


def suppress(decoded: np.ndarray, conf: float, iou: float, max_det: int) -> Detections:
    """Keeps the good cells, all of whose numbers are finite, and of boxes that overlap the best one.

    Args:
      decoded: [n, 4 + 1 + m] of an image, as `models.fast_sam.decode` gives them.
      conf: what a score must exceed.
      iou: which the IoU of two boxes may not exceed.
      max_det: the most that are kept.
    """
    decoded = np.asarray(decoded, np.float32)
    cells = np.flatnonzero((decoded[:, 4] > conf) & np.isfinite(decoded).all(axis=1))
    cells = cells[np.argsort(-decoded[cells, 4], kind="stable")[:MOST_CANDIDATES]]
    rows = decoded[cells]
    half = rows[:, 2:4] / 2
    boxes = np.concatenate([rows[:, :2] - half, rows[:, :2] + half], axis=1)
    kept = best_of(boxes, iou, max_det)
    return Detections(boxes[kept], rows[kept, 4], rows[kept, 5:], cells[kept])


def best_of(boxes: np.ndarray, iou: float, most: int) -> np.ndarray:
    """Suppresses boxes [n, 4] by those before them. Returns the indices of at most `most` that stay."""
    left, kept = np.arange(len(boxes)), []
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[~(overlaps(boxes[left], boxes[best]) > iou)]
    return np.array(kept, int)


def overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """IoU [n] of boxes [n, 4] with one; 0 where neither has an area."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    union = areas - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def to_border(boxes: np.ndarray, frame: tuple[int, int], several: bool = True) -> np.ndarray:
    """Moves sides that lie near the border of the frame onto it, and makes boxes that nearly fill it fill it.

    Args:
      boxes: [n, 4].
      frame: (height, width).
      several: whether two boxes and more may fill it, with which the original fails.

    Raises:
      RunError: there are several that may not be.
    """
    height, width = frame
    moved = boxes.copy()
    moved[:, :2][boxes[:, :2] < BORDER] = 0
    for axis, side in ((2, width), (3, height)):
        moved[boxes[:, axis] > side - BORDER, axis] = side
    whole = np.array([0, 0, width, height], boxes.dtype)
    full = overlaps(moved, whole) > FULL
    if full.sum() > 1 and not several:
        raise RunError(f"{int(full.sum())} boxes fill the image, and the original fails with more than one")
    moved[full] = whole
    return moved


def to_image(boxes: np.ndarray, place: Letterbox, original: tuple[int, int]) -> np.ndarray:
    """Boxes [n, 4] of the frame in pixels of the image, (height, width), cut off at its border."""
    gain = min(place.frame[0] / original[0], place.frame[1] / original[1])
    left, top = (round((place.frame[i] - original[i] * gain) / 2 - 0.1) for i in (1, 0))
    scaled = (boxes - np.array([left, top, left, top], boxes.dtype)) / boxes.dtype.type(gain)
    return np.clip(scaled, 0, np.array([original[1], original[0]] * 2, boxes.dtype))
