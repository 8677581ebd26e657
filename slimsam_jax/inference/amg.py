"""Parts of the automatic mask generator: grids, crops, boxes, suppression, small regions.

As `segment_anything/utils/amg.py`, in numpy. Boxes are x0, y0, x1, y1 in pixels, both ends within the mask.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import ndimage

from slimsam_jax.imaging.geometry import bounding_window


def build_point_grid(n_per_side: int) -> np.ndarray:
    """Makes a grid of points evenly spaced in 0..1, row by row: [n * n, 2] (x, y)."""
    steps = (np.arange(n_per_side) + 0.5) / n_per_side
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)


def generate_crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[np.ndarray, int]]:
    """Lists the crops of an image: the whole, then 4, 16, ... overlapping ones.

    Args:
      size: (height, width).
      overlap_ratio: of the shorter side, in the first layer; half as much in each further one.

    Returns:
      (box, layer) of each; here x1 and y1 lie just outside.
    """
    height, width = size
    boxes = [(np.array([0, 0, width, height]), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * 2 / count)
        crop_w, crop_h = (math.ceil((overlap * (count - 1) + side) / count) for side in (width, height))
        corners = itertools.product(*([(crop - overlap) * i for i in range(count)] for crop in (crop_w, crop_h)))
        boxes += [(np.array([x, y, min(x + crop_w, width), min(y + crop_h, height)]), layer) for x, y in corners]
    return boxes


def is_box_near_crop_edge(boxes: np.ndarray, crop_box: np.ndarray, size: tuple[int, int], atol: float = 20.0):
    """Tells which boxes (in the image's frame) the crop's edge cuts off, where it is not the image's: [n] bool."""
    image = np.array([0, 0, size[1], size[0]])
    near_crop, near_image = (np.abs(boxes - edge) <= atol for edge in (crop_box, image))
    return (near_crop & ~near_image).any(axis=1)


def mask_to_box(mask: np.ndarray) -> np.ndarray:
    """Returns the box [4] of a mask [h, w] bool; zeros of an empty one."""
    rows, columns = bounding_window(mask)
    return np.maximum([columns.start, rows.start, columns.stop - 1, rows.stop - 1], 0)


def box_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Suppresses boxes that overlap a better one by more than a threshold. Returns indices to keep, best first.

    As torchvision on a CPU: areas without the last pixel, so that a box one pixel wide has none and neither
    suppresses nor is suppressed; IoU in float32, the threshold in float64, which decides where both are equal.
    """
    boxes = boxes.astype(np.float32)
    order, areas, kept = np.argsort(-scores, kind="stable"), box_area(boxes), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[order, :2]), np.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0, which exceeds nothing
            iou = shared / (areas[best] + areas[order] - shared)
        order = order[~(iou.astype(np.float64) > iou_threshold)]
    return np.array(kept, int)


def remove_small_regions(mask: np.ndarray, area: float) -> tuple[np.ndarray, bool]:
    """Fills holes of fewer than `area` pixels, then drops islands that are as small; the largest always stays.

    Args:
      mask: [h, w] bool. Pixels that touch by a corner are together, of the mask as of a hole.

    Returns:
      The mask, and whether any region is small: for the original that counts as changed, though the only one stays.
    """
    holes = _small(~mask, area)
    filled = mask | holes
    islands = _small(filled, area)
    small = bool(holes.any() or islands.any())
    if islands.any() and (islands == filled).all():
        islands &= ~_largest(filled)
    return filled & ~islands, small


def _regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels connected regions [h, w] from 1. Returns them, and the number of pixels of each label, 0 for the rest."""
    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    sizes[0] = 0
    return regions, sizes


def _small(mask: np.ndarray, area: float) -> np.ndarray:
    """Returns the part of the mask that lies in regions of fewer than `area` pixels."""
    regions, sizes = _regions(mask)
    return mask & (sizes < area)[regions]


def _largest(mask: np.ndarray) -> np.ndarray:
    regions, sizes = _regions(mask)
    return regions == sizes.argmax()
