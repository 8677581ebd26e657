"""Letterbox: an image scaled to fit, in the middle of a grey frame; resized to the bit as OpenCV does. numpy alone.

OpenCV's bilinear resize of bytes is no interpolation of real numbers: weights are rounded to 11 bits, and products are
cut off in between (`modules/imgproc/src/resize.cpp`, Apache-2.0). A network sees the difference, so it is done again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

GREY = 114
SCALE = 1 << 11  # of the weights
ROWS_AT_ONCE = 1 << 22  # numbers of 32 bits that are in memory at a time


class Letterbox(NamedTuple):
    """Where an image lies in its frame; sizes are (height, width) in pixels.

    Attributes:
      size: of the scaled image.
      top, left: what is above and left of it.
      frame: of the frame.
    """

    size: tuple[int, int]
    top: int
    left: int
    frame: tuple[int, int]


def fit(original: tuple[int, int], side: int, rectangle: bool = True, stride: int = 32) -> Letterbox:
    """Places an image in its frame.

    Args:
      original: (height, width) of the image; it may be scaled up.
      side: of the square that it must fit into.
      rectangle: leave out whole `stride`s of what would be padded, so that the frame is as small as the network takes.
    """
    ratio = min(side / original[0], side / original[1])
    size = tuple(max(1, round(length * ratio)) for length in original)  # halves to even, as Python rounds
    spare = [(side - length) % stride if rectangle else side - length for length in size]
    top, left = (round(length / 2 - 0.1) for length in spare)
    frame = tuple(length + more for length, more in zip(size, spare, strict=True))
    return Letterbox(size, top, left, frame)


def letterbox(image: np.ndarray, place: Letterbox) -> np.ndarray:
    """Scales an image [h0, w0, c] uint8 into its frame [h, w, c]."""
    frame = np.full((*place.frame, image.shape[2]), GREY, np.uint8)
    inner = frame[place.top : place.top + place.size[0], place.left : place.left + place.size[1]]
    inner[:] = resize(image, place.size)
    return frame


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes [h, w, c] uint8 to (height, width) as OpenCV's INTER_LINEAR does, to the bit; no antialiasing."""
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    if (height, width) == (2 * size[0], 2 * size[1]):  # for which OpenCV takes the mean of four
        quarters = [image[i::2, j::2].astype(np.uint16) for i in range(2) for j in range(2)]
        return ((sum(quarters) + 2) >> 2).astype(np.uint8)
    rows, columns = _taps(height, size[0], clamp=False), _taps(width, size[1], clamp=True)
    result = np.empty((*size, image.shape[2]), np.uint8)
    step = max(1, ROWS_AT_ONCE // (max(width, size[1]) * image.shape[2]))
    for start in range(0, size[0], step):
        part = slice(start, start + step)
        result[part] = _resized(image, [tap[part] for tap in rows], columns)
    return result


def _resized(image: np.ndarray, rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    low, high, low_weight, high_weight = rows
    upper, lower = (_along(image[places], columns) >> 4 for places in (low, high))
    shape = (-1, 1, 1)
    sums = (upper * low_weight.reshape(shape) >> 16) + (lower * high_weight.reshape(shape) >> 16)
    return np.clip((sums + 2) >> 2, 0, 255).astype(np.uint8)


def _along(rows: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
    """Interpolates rows [k, w, c] along w: int32, times `SCALE`."""
    low, high, low_weight, high_weight = columns
    shape = (1, -1, 1)
    return rows[:, low] * low_weight.reshape(shape) + rows[:, high] * high_weight.reshape(shape)


def _taps(source: int, target: int, clamp: bool) -> list[np.ndarray]:
    """Places of the two pixels that each output lies between, and their weights.

    Args:
      clamp: beyond the ends the outermost pixel alone; without it that pixel twice, whose weights are rounded apart.
    """
    centres = ((np.arange(target) + 0.5) * (1 / (target / source)) - 0.5).astype(np.float32)
    low = np.floor(centres).astype(np.int64)
    share = centres - low.astype(np.float32)
    if clamp:
        outside = (low < 0) | (low >= source - 1)
        share = np.where(outside, np.float32(0), share)
    weights = [np.rint(part * np.float32(SCALE)).astype(np.int32) for part in (np.float32(1) - share, share)]
    return [np.clip(low, 0, source - 1), np.clip(low + 1, 0, source - 1), *weights]
