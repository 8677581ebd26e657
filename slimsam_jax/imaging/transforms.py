"""Transforms images into the model frame, and masks back out of it. numpy and Pillow alone.

Frames: the *original* frame is the image's own (h0, w0) pixels; the *model* frame is `config.image_size`, into which
the image is scaled so that it fits, top left, the rest being padding. Points are (x, y), boxes x0, y0, x1, y1, sizes
(height, width).
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.sparse
from PIL import Image


def resized_shape(size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size in the model frame of an image of `size`: the largest that fits, rounded half up, at least 1."""
    scale = min(image_size[0] / size[0], image_size[1] / size[1])
    return tuple(max(1, int(side * scale + 0.5)) for side in size)


def resize_and_pad(image: np.ndarray | Image.Image, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image so that it fits, and pads it to the model frame, to the pixel as the original (PIL bilinear).

    Args:
      image: [h0, w0, 3] uint8 RGB, or a PIL image in mode RGB.
      image_size: (H, W) of the model frame.

    Returns:
      [H, W, 3] uint8 with zeros below and right of the image, and the image's [2] int32 size in it.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height, width = resized_shape((image.height, image.width), image_size)
    frame = np.zeros((*image_size, 3), np.uint8)
    frame[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return frame, np.array([height, width], np.int32)


def to_model_frame(xy: np.ndarray, size: tuple[int, int], original_size: tuple[int, int]) -> np.ndarray:
    """Scales (x, y) pairs from the original to the model frame: [..., 2] -> [..., 2] float32.

    Args:
      size: the image's size in the model frame, from `resize_and_pad`.
      original_size: its own size.
    """
    scale = np.array([size[1] / original_size[1], size[0] / original_size[0]])
    return (np.asarray(xy, np.float64) * scale).astype(np.float32)


def resize_masks(
    image_size: tuple[int, int], masks: np.ndarray, size: tuple[int, int], original_size: tuple[int, int]
) -> np.ndarray:
    """Resizes low-resolution logits to the original frame.

    The original enlarges to the model frame, crops the padding and resizes again, all
    bilinear. Each is linear and separable, so the two become one matrix per axis, of
    three weights a row, which costs a fraction and compiles nothing per image size.

    Args:
      image_size: (H, W) of the model frame.
      masks: [..., 4h, 4w] logits from `decode`.

    Returns:
      [..., h0, w0] float32; a mask is where they exceed 0.
    """
    rows, columns = (enlarging(masks.shape[i - 2], image_size[i], size[i], original_size[i]) for i in (0, 1))
    return resized(masks, rows, columns)


def resized(planes: np.ndarray, rows: scipy.sparse.csr_array, columns: scipy.sparse.csr_array) -> np.ndarray:
    """Planes [..., h, w] resized by a matrix per axis, [h', h] and [w', w]: [..., h', w'] float32."""
    planes = np.asarray(planes, np.float32)
    found = np.empty((*planes.shape[:-2], rows.shape[0], columns.shape[0]), np.float32)
    for index in np.ndindex(planes.shape[:-2]):
        found[index] = rows @ np.ascontiguousarray((columns @ np.ascontiguousarray(planes[index].T)).T)
    return found


@functools.lru_cache(maxsize=32)
def enlarging(source: int, frame: int, size: int, original: int) -> scipy.sparse.csr_array:
    """Returns the resizing of one axis of a mask, [original, source]: to the model frame, and `size` of that back."""
    return scipy.sparse.csr_array(bilinear_matrix(size, original) @ bilinear_matrix(source, frame)[:size])


@functools.lru_cache(maxsize=32)
def bilinear_matrix(source: int, target: int) -> scipy.sparse.csr_array:
    """Returns weights of bilinear interpolation, [target, source] float32: `align_corners=False`, no antialiasing."""
    centres = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0.0)
    low = np.minimum(centres.astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    weights = np.concatenate([1 - (centres - low), centres - low])
    places = np.tile(np.arange(target), 2), np.concatenate([low, high])
    # Not dense: one side of an image may be tens of thousands of pixels.
    matrix = scipy.sparse.csr_array((weights, places), shape=(target, source)).astype(np.float32)
    matrix.eliminate_zeros()
    return matrix


@functools.lru_cache(maxsize=32)
def antialiased_matrix(source: int, target: int) -> scipy.sparse.csr_array:
    """Returns weights of bilinear interpolation that averages where it shrinks, [target, source] float32.

    PyTorch's `antialias=True`: a triangle as wide as a target's pixel, or as a source's where that is larger.
    """
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    low = np.maximum((centres - support + 0.5).astype(int), 0)
    high = np.minimum((centres + support + 0.5).astype(int), source)
    columns = low[:, None] + np.arange((high - low).max())
    weights = np.maximum(1 - np.abs(columns + 0.5 - centres[:, None]) / support, 0) * (columns < high[:, None])
    weights /= weights.sum(1, keepdims=True)
    places = np.repeat(np.arange(target), columns.shape[1]), np.minimum(columns, source - 1).ravel()
    matrix = scipy.sparse.csr_array((weights.ravel(), places), shape=(target, source)).astype(np.float32)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix
