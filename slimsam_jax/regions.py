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
    """The pixel farthest from everything outside a region, of which the picture's border is part.

    Args:
      region: [h, w] bool. The first of equals, by rows; the middle of the picture if it is empty.
      taken: (x, y) in pixels that shall not be chosen.

    Returns:
      (x, y), the centre of the pixel, and its Euclidean distance in pixels to the nearest pixel outside (0 if empty).
    """
    from scipy.ndimage import distance_transform_edt  # slow to import, and rarely needed

    if not region.any():
        return np.array(region.shape[::-1]) / 2, 0.0
    rows, columns = window = extent(region)
    corner = np.array([columns.start, rows.start])
    depth = distance_transform_edt(np.pad(region[window], 1))[1:-1, 1:-1]
    for x, y in np.asarray(taken, int).reshape(-1, 2) - corner:
        if 0 <= y < depth.shape[0] and 0 <= x < depth.shape[1]:
            depth[y, x] = 0
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return corner + np.array([x + 0.5, y + 0.5]), float(depth[y, x])
