"""FastSAM's masks: weighted sums of prototypes within boxes, kept as bits of the box's window. numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse

from slimsam_jax.errors import InputError
from slimsam_jax.imaging.letterbox import Letterbox
from slimsam_jax.imaging.transforms import bilinear_matrix

MOST_BYTES = 1 << 30  # of the bits of an image's masks: 300 of 28 million pixels


class Part(NamedTuple):
    """A mask within its window.

    Attributes:
      window: rows and columns of the image.
      bits: [rows, ceil(columns / 8)] uint8, packed.
      area: pixels.
    """

    window: tuple[slice, slice]
    bits: np.ndarray
    area: int


class Masks:
    """Masks of an image, each in the memory of its window: one is unpacked at a time.

    Attributes:
      shape: (height, width) of each.
      areas: [n] pixels.
    """

    def __init__(self, shape: tuple[int, int], parts: Iterable[Part]):
        self.shape, self._parts = shape, list(parts)
        self.areas = np.array([part.area for part in self._parts], int)

    @classmethod
    def of_arrays(cls, masks: np.ndarray) -> Masks:
        """From [n, h, w] bool."""
        return cls(masks.shape[1:], [pack(mask, np.s_[: masks.shape[1], : masks.shape[2]]) for mask in masks])

    def take(self, index: np.ndarray) -> Masks:
        """Some of them."""
        return Masks(self.shape, [self._parts[i] for i in index])

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        """[h, w] bool."""
        mask = np.zeros(self.shape, bool)
        self.assign(mask, index, True)
        return mask

    def assign(self, image: np.ndarray, index: int, value: bool) -> None:
        """Sets or clears a mask's pixels of an array [h, w] bool."""
        image[self._parts[index].window][unpack(self._parts[index])] = value

    def holds(self, x: int, y: int) -> np.ndarray:
        """Whether a pixel lies on each mask, [n]; outside of the image on none."""
        return np.array([bit(part, x, y) for part in self._parts], bool)

    def shared(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """Pixels of each mask within a box of whole numbers, its ends outside, [n]."""
        return np.array([int(inside(part, box).sum()) for part in self._parts], int)


def pack(mask: np.ndarray, window: tuple[slice, slice]) -> Part:
    """A mask of [rows, columns] of a window."""
    return Part(window, np.packbits(mask, axis=1), int(mask.sum()))


def unpack(part: Part) -> np.ndarray:
    """The mask of [rows, columns] of its window."""
    columns = part.window[1]
    return np.unpackbits(part.bits, axis=1, count=columns.stop - (columns.start or 0)).astype(bool)


def bit(part: Part, x: int, y: int) -> bool:
    """A pixel of a mask."""
    top, left = (side.start or 0 for side in part.window)
    if not (top <= y < part.window[0].stop and left <= x < part.window[1].stop):
        return False
    return bool(part.bits[y - top, (x - left) >> 3] >> (7 - (x - left) % 8) & 1)


def inside(part: Part, box: tuple[int, int, int, int]) -> np.ndarray:
    """The part of a mask that lies in a box."""
    top, left = (side.start or 0 for side in part.window)
    x0, y0, x1, y1 = (max(0, side - start) for side, start in zip(box, (left, top) * 2, strict=True))
    return unpack(part)[y0:y1, x0:x1]


def window_of(box: np.ndarray, shape: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels whose column and row are at least the lower ends of a box, and less than the upper ones."""
    ends = zip(box[:2], box[2:], shape[::-1], strict=True)
    columns, rows = (slice(*(min(max(0, math.ceil(end)), side) for end in (low, high))) for low, high, side in ends)
    return tuple(slice(side.start, max(side.start, side.stop)) for side in (rows, columns))


def in_image(coefficients: np.ndarray, prototypes: np.ndarray, boxes: np.ndarray, shape: tuple[int, int]) -> Masks:
    """Masks at the image's own size: logits without the grey bars, enlarged, and then cut off at the boxes.

    Args:
      coefficients: [n, m].
      prototypes: [h, w, m] of the frame.
      boxes: [n, 4] in pixels of the image.
      shape: (height, width) of the image.

    Raises:
      InputError: the masks would take more than `MOST_BYTES`; no memory has been asked for then.
    """
    windows, inner = windows_of(boxes, shape), prototypes[without_bars(prototypes.shape[:2], shape)]
    return enlarged(coefficients, inner, windows, *map(bilinear_matrix, inner.shape[:2], shape))


def enlarged(
    coefficients: np.ndarray,
    prototypes: np.ndarray,
    windows: list[tuple[slice, slice]],
    rows: scipy.sparse.csr_array,
    columns: scipy.sparse.csr_array,
) -> Masks:
    """Masks within windows, from `windows_of`, of logits resized by a matrix per axis, [H, h] and [W, w]."""

    def part(weights: np.ndarray, window: tuple[slice, slice]) -> Part:
        logits = np.ascontiguousarray((prototypes @ weights).T)  # of low resolution, [w, h]
        along = np.ascontiguousarray((columns[window[1]] @ logits).T)
        return pack(rows[window[0]] @ along > 0, window)

    return Masks((rows.shape[0], columns.shape[0]), map(part, coefficients, windows))


def in_frame(coefficients: np.ndarray, prototypes: np.ndarray, boxes: np.ndarray, place: Letterbox) -> Masks:
    """Masks at the frame's size, bars and all: logits cut off at the boxes, and then enlarged, which softens the cut.

    Args:
      coefficients, prototypes: as `in_image` takes them.
      boxes: [n, 4] in pixels of the frame.
    """
    frame, low = place.frame, prototypes.shape[:2]
    whole = np.s_[: frame[0], : frame[1]]
    check_memory([whole] * len(boxes))
    rows, columns = (bilinear_matrix(low[i], frame[i]) for i in (0, 1))
    scale = np.array([low[1] / frame[1], low[0] / frame[0]] * 2, boxes.dtype)

    def part(weights: np.ndarray, box: np.ndarray) -> Part:
        logits = np.zeros(low, np.float32)
        window = window_of(box, low)
        logits[window] = prototypes[window] @ weights
        along = np.ascontiguousarray((columns @ np.ascontiguousarray(logits.T)).T)
        return pack(rows @ along > 0, whole)

    return Masks(frame, map(part, coefficients, boxes * scale))


def without_bars(low: tuple[int, int], shape: tuple[int, int]) -> tuple[slice, slice]:
    """The part of the prototypes [h, w] that is image, as the original cuts it: real numbers, cut off to whole ones."""
    gain = min(low[0] / shape[0], low[1] / shape[1])
    bars = [(low[i] - shape[i] * gain) / 2 for i in (0, 1)]
    rows, columns = (slice(int(bar), int(side - bar)) for bar, side in zip(bars, low, strict=True))
    return rows, columns


def windows_of(boxes: np.ndarray, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """`window_of` each of [n, 4] boxes; raises InputError if masks in them would not fit, before any is made."""
    windows = [window_of(box, shape) for box in boxes]
    check_memory(windows)
    return windows


def check_memory(windows: list[tuple[slice, slice]]) -> None:
    """Raises InputError if the bits of masks in these windows would take more than `MOST_BYTES`."""
    sides = ([side.stop - (side.start or 0) for side in window] for window in windows)
    size = sum(rows * -(-columns // 8) for rows, columns in sides)
    if size > MOST_BYTES:
        raise InputError(
            f"{len(windows)} masks of an image this large take {size >> 20} MB, and at most {MOST_BYTES >> 20} are "
            "taken: make the image smaller, or ask for fewer masks (max_det)"
        )
