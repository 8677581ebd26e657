"""Geometry of masks: the window that holds them, and a point well inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bounding_window(*masks: np.ndarray) -> tuple[slice, slice]:
    """Returns the rows and columns of the smallest window that holds all masks [..., h, w]; empty if they are."""

    def span(used: np.ndarray) -> slice:
        index = np.flatnonzero(used)
        return slice(index[0], index[-1] + 1) if len(index) else slice(0, 0)

    flat = [mask.reshape(-1, *mask.shape[-2:]) for mask in masks]
    return tuple(span(np.logical_or.reduce([m.any((0, axis)) for m in flat])) for axis in (2, 1))


def interior_point(region: np.ndarray, taken: Sequence[Sequence[float]] = ()) -> tuple[np.ndarray, float]:
    """Returns the pixel of a region that is farthest from its outside, to which all beyond the image belongs.

    Args:
      region: [h, w] bool. Of equals the first by rows is taken; of an empty one the middle of the image.
      taken: (x, y) in pixels that shall not be chosen.

    Returns:
      (x, y), the centre of the pixel, and its Euclidean distance in pixels to the nearest pixel outside (0 if empty).
    """
    if not region.any():
        return np.array(region.shape[::-1]) / 2, 0.0
    rows, columns = window = bounding_window(region)
    corner = np.array([columns.start, rows.start])
    depth = _squared_depth(region[window])
    for x, y in np.asarray(taken, int).reshape(-1, 2) - corner:
        if 0 <= y < depth.shape[0] and 0 <= x < depth.shape[1]:
            depth[y, x] = 0
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return corner + np.array([x + 0.5, y + 0.5]), float(np.sqrt(depth[y, x]))


def _squared_depth(region: np.ndarray) -> np.ndarray:
    """Returns each pixel's squared distance to the nearest one outside, [h, w] int32.

    SciPy's own distances take three times the memory. No pixel is farther than half of the shorter side from outside,
    so that squares do not wrap.
    """
    from scipy.ndimage import distance_transform_edt  # slow to import, and rarely needed

    nearest = distance_transform_edt(np.pad(region, 1), return_distances=False, return_indices=True)[:, 1:-1, 1:-1]
    for axis, side in enumerate(region.shape):
        nearest[axis] -= np.expand_dims(np.arange(1, side + 1, dtype=np.int32), 1 - axis)
    np.square(nearest, out=nearest)
    return nearest[0] + nearest[1]
