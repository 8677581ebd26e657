"""Rasterises COCO's polygons, checked before pycocotools' C code sees them: it trusts every number that it is given.

It walks along all edges in steps of a fifth of a pixel and allocates for each; coordinates become C integers.
Then it unites the polygons one after the other, each time over all runs so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.imaging.rle import MOST_PIXELS

BEYOND = 1  # image sizes by which a polygon may leave the image on each side
STEPS_PER_PIXEL = 5  # of rleFrPoly in pycocotools' maskApi.c
MOST_STEPS = 2**22  # of one object: 840,000 pixels of outline, 120 MB
MOST_TOGETHER = 2**25  # of all objects of an image: three seconds
MOST_UNITED = 2**32  # polygons of one object times their steps: half a second
MOST_POLYGONS = 2**14  # of one object


def to_rle(polygons: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Rasterises all polygons together, by COCO's own rule, which no other rasteriser follows to the pixel.

    Args:
      polygons: [[x, y, x, y, ...], ...] in pixels; those of less than three points are passed by.
      size: (height, width) of the image.

    Returns:
      As `rle.decode` takes it.

    Raises:
      ValueError, TypeError: not polygons, or ones that cannot be of this image.
      InputError: pycocotools is not installed.
    """
    check(polygons, size)
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError("polygons need pycocotools: pip install 'slimsam_jax[coco]'") from None
    return mask.merge(mask.frPyObjects(enclosing(polygons), *size))


def enclosing(polygons: Any) -> list[Any]:
    """Returns the polygons of at least three points. Fewer, which some tools write beside the others, enclose nothing.

    Raises:
      ValueError: there are none.
    """
    if not isinstance(polygons, list):
        raise ValueError("neither run lengths nor a list of polygons")
    whole = [polygon for polygon in polygons if not isinstance(polygon, list) or len(polygon) >= 6]
    if not whole:
        raise ValueError("no polygon of at least three points")
    return whole


def check_together(objects: Iterable[Any], size: tuple[int, int]) -> None:
    """Raises ValueError or TypeError unless pycocotools can be given the polygons of all objects of an image."""
    steps = sum(check(polygons, size) for polygons in objects)
    if steps > MOST_TOGETHER:
        raise ValueError(f"polygons with an outline of {steps // STEPS_PER_PIXEL} pixels together")


def check(polygons: Any, size: tuple[int, int]) -> int:
    """Counts pycocotools' steps along the outline of an object, once it can be given the polygons.

    Raises:
      ValueError, TypeError: it cannot; see `to_rle`.
    """
    if min(size) < 1 or math.prod(size) > MOST_PIXELS:
        raise ValueError(f"an image of {size[1]} x {size[0]} pixels, which there is none of")
    polygons = enclosing(polygons)
    if len(polygons) > MOST_POLYGONS:
        raise ValueError(f"{len(polygons)} polygons of one object")
    steps = 0
    for polygon in polygons:
        steps += _steps(polygon, size)
        if steps > MOST_STEPS or steps * len(polygons) > MOST_UNITED:
            raise ValueError(f"{len(polygons)} polygons with an outline of {steps // STEPS_PER_PIXEL} pixels and more")
    return steps


def _steps(polygon: Sequence[float], size: tuple[int, int]) -> int:
    """Counts pycocotools' steps along the outline of one polygon, once it is known to be one."""
    if not isinstance(polygon, list) or len(polygon) % 2:
        raise ValueError("a polygon that is no list of x, y, x, y ...")
    if len(polygon) > MOST_STEPS or not all(type(number) in (int, float) for number in polygon):
        raise ValueError("a polygon that is not of numbers, or of too many")
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    width_height = np.array(size[::-1])
    if not ((corners >= -BEYOND * width_height) & (corners <= (1 + BEYOND) * width_height)).all():  # NaN, too
        raise ValueError(f"a polygon with a corner far outside of its image of {size[1]} x {size[0]} pixels")
    edges = np.abs(corners - np.roll(corners, -1, axis=0)).max(1)
    return len(corners) + int(STEPS_PER_PIXEL * edges.sum())
