"""Where a mask lies, and what its middle is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def extent(*masks: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the smallest window that all of the masks [..., h, w] lie in; empty if they are."""

    def span(used: np.ndarray) -> slice:
        found = np.flatnonzero(used)
        return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)

    flat = [mask.reshape(-1, *mask.shape[-2:]) for mask in masks]
    return tuple(span(np.logical_or.reduce([m.any((0, axis)) for m in flat])) for axis in (2, 1))


def deepest(region: np.ndarray, taken: Sequence[Sequence[float]] = ()) -> tuple[np.ndarray, float]:
    """The pixel farthest from everything outside a region, of which the image's border is part.

    Args:
      region: [h, w] bool. The first of equals, by rows; the middle of the image if it is empty.
      taken: (x, y) in pixels that shall not be chosen.

    Returns:
      (x, y), the centre of the pixel, and its Euclidean distance in pixels to the nearest pixel outside (0 if empty).
    """
    if not region.any():
        return np.array(region.shape[::-1]) / 2, 0.0
    rows, columns = window = extent(region)
    corner = np.array([columns.start, rows.start])
    depth = _squared_depth(region[window])
    for x, y in np.asarray(taken, int).reshape(-1, 2) - corner:
        if 0 <= y < depth.shape[0] and 0 <= x < depth.shape[1]:
            depth[y, x] = 0
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return corner + np.array([x + 0.5, y + 0.5]), float(np.sqrt(depth[y, x]))


def _squared_depth(region: np.ndarray) -> np.ndarray:
    """[h, w] int32, the squared distance of each pixel to the nearest outside. SciPy's distances take 3 x the memory.

    No pixel is farther than half of the shorter side from outside, so that squares do not wrap.
    """
    from scipy.ndimage import distance_transform_edt  # slow to import, and rarely needed

    nearest = distance_transform_edt(np.pad(region, 1), return_distances=False, return_indices=True)[:, 1:-1, 1:-1]
    for axis, side in enumerate(region.shape):
        nearest[axis] -= np.expand_dims(np.arange(1, side + 1, dtype=np.int32), 1 - axis)
    np.square(nearest, out=nearest)
    return nearest[0] + nearest[1]
