"""Plain shapes on soft grounds, and what the cells of a FastSAM shall learn of them; see `fast_sam_batch_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.reference_data.surfaces import Rng, gradient, shape
from slimsam_jax.imaging.geometry import bounding_window
from slimsam_jax.models.fast_sam_config import BINS, STRIDES

SIDE, SIZES, MOST = 128, (20, 100), 4  # pixels of an image and of a shape, and shapes in an image
SMALLEST = 60  # pixels of a shape that is seen
CELLS = 9 * MOST  # of an image that learn, at most


class Scene(NamedTuple):
    """An image [side, side, 3] uint8, and the masks of what is visible, [n, side, side] bool."""

    image: np.ndarray
    masks: list[np.ndarray]


class Batch(NamedTuple):
    """b images with p cells that learn, of n shapes each; what fills up is not `real`.

    Attributes:
      images: [b, side, side, 3] uint8.
      cells, objects: [b, p] numbers of a cell, levels one after the other, and of its shape.
      real: [b, p] bool.
      distances: [b, p, 4] from the cell's middle to left, top, right and bottom, in cells.
      masks, windows: [b, n, side / 4, side / 4] float32, of the shapes and their boxes.
    """

    images: np.ndarray
    cells: np.ndarray
    objects: np.ndarray
    real: np.ndarray
    distances: np.ndarray
    masks: np.ndarray
    windows: np.ndarray


def draw(random: Rng) -> Scene:
    """One to four shapes of one colour each, later ones over earlier ones."""
    image, covers = gradient((SIDE, SIDE), random), []
    for _ in range(int(random.integers(1, MOST + 1))):
        outline = compact(round(np.exp(random.uniform(*np.log(SIZES)))), random)
        x, y = (int(random.integers(0, SIDE - side + 1)) for side in outline.size)
        cover = Image.new("L", (SIDE, SIDE))
        cover.paste(outline, (x, y))
        image.paste(colour(image, random), (0, 0), cover)
        covers.append(np.asarray(cover) >= 128)
    visible = [cover & ~np.any(covers[i + 1 :], axis=0) for i, cover in enumerate(covers)]
    return Scene(np.asarray(image), [mask for mask in visible if mask.sum() >= SMALLEST])


def compact(side: int, random: Rng) -> Image.Image:
    """A shape that fills half of its square: rings and lines take longer to learn."""
    while True:
        outline = shape(side, random)
        if np.mean(np.asarray(outline) >= 128) >= 0.5:
            return outline


def colour(image: Image.Image, random: Rng) -> tuple[int, int, int]:
    """One that stands out from the mean of an image."""
    while True:
        found = random.integers(0, 256, 3)
        if np.abs(found - np.asarray(image).mean((0, 1))).max() >= 80:
            return tuple(map(int, found))


def batch_of(scenes: Sequence[Scene]) -> Batch:
    return Batch(*map(np.stack, zip(*map(_one, scenes), strict=True)))


def _one(scene: Scene) -> tuple[np.ndarray, ...]:
    masks, windows = (np.zeros((MOST, SIDE // 4, SIDE // 4), np.float32) for _ in range(2))
    rows: dict[int, tuple[int, np.ndarray]] = {}
    for i, mask in enumerate(scene.masks):
        box = bounding_window(mask)
        inside = np.zeros_like(mask)
        inside[box] = True
        masks[i], windows[i] = (_quarter(each) for each in (mask, inside))
        rows |= {cell: (i, distances) for cell, distances in _cells(box)}
    count = len(rows)
    cells, objects, real = (np.zeros(CELLS, kind) for kind in (np.int32, np.int32, bool))
    distances = np.zeros((CELLS, 4), np.float32)
    if count:
        cells[:count], real[:count] = list(rows), True
        objects[:count], distances[:count] = zip(*rows.values(), strict=True)
    return scene.image, cells, objects, real, distances, masks, windows


def _quarter(mask: np.ndarray) -> np.ndarray:
    """[side, side] bool -> [side / 4, side / 4], 1 where most of it is."""
    return mask.reshape(SIDE // 4, 4, SIDE // 4, 4).mean((1, 3)) >= 0.5


def _cells(box: tuple[slice, slice]) -> list[tuple[int, np.ndarray]]:
    """(cell, distances) of those whose middle is within a cell's width of the box's, on the level of its size."""
    rows, columns = box
    low, high = np.array([columns.start, rows.start]), np.array([columns.stop, rows.stop])
    level = int(np.searchsorted((32, 64), (high - low).max()))
    stride, first = STRIDES[level], sum((SIDE // stride) ** 2 for stride in STRIDES[:level])
    found = []
    for y, x in np.ndindex(SIDE // stride, SIDE // stride):
        middle = (np.array([x, y]) + 0.5) * stride
        if (np.abs(middle - (low + high) / 2) <= stride).all():
            distances = np.concatenate([middle - low, high - middle]) / stride
            found.append((first + y * (SIDE // stride) + x, distances.clip(0, BINS - 1.01).astype(np.float32)))
    return found[:9]
