"""Prepares images and prompts for EfficientSAM, and resizes its masks back. On the host, in numpy.

The *original* frame is the image's own (h0, w0) pixels; the *model* frame is `image_size`, which the image is squashed
to, its aspect lost, so that nothing is padded. Points are (x, y), boxes x0, y0, x1, y1, sizes (height, width).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from slimsam_jax.errors import InputError
from slimsam_jax.imaging.transforms import bilinear_matrix
from slimsam_jax.models.bicubic import bicubic_matrix
from slimsam_jax.models.efficient_sam_head import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, INVALID, MOST_POINTS, POINT

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1


def preprocess(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Squashes an image to the model frame, bilinear without antialiasing, and normalises it.

    Args:
      image: [h0, w0, 3] uint8, RGB.
      image_size: (H, W) of the model frame.

    Returns:
      [H, W, 3] float32.
    """
    pixels = np.asarray(image, np.float32) / 255
    rows, columns = (bilinear_matrix(pixels.shape[i], image_size[i]) for i in (0, 1))
    squashed = np.stack([separable(rows, columns, pixels[..., channel]) for channel in range(3)], axis=-1)
    return (squashed - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)


def separable(rows: scipy.sparse.csr_array, columns: scipy.sparse.csr_array, plane: np.ndarray) -> np.ndarray:
    """A plane [h, w] resized by a matrix per axis, [h', h] and [w', w]."""
    return rows @ np.ascontiguousarray((columns @ np.ascontiguousarray(plane.T)).T)


def to_model_frame(points: np.ndarray, image_size: tuple[int, int], original_size: tuple[int, int]) -> np.ndarray:
    """Scales (x, y) from the original to the model frame, [..., 2] float32; what is negative becomes -1."""
    points = np.asarray(points, np.float32)
    scaled = points * np.float32(image_size[::-1]) / np.float32(original_size[::-1])
    return np.where(points >= 0, scaled, np.float32(-1))


def fill_points(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brings prompts to `MOST_POINTS` points as the original does: fills up with (-1, -1), cuts off what is more.

    Args:
      points: [p, n, 2] in the model frame.
      labels: [p, n].

    Returns:
      [p, 6, 2] float32, [p, 6] int32.
    """
    missing = max(0, MOST_POINTS - labels.shape[1])
    points = np.pad(np.float32(points), ((0, 0), (0, missing), (0, 0)), constant_values=-1)
    labels = np.pad(np.int32(labels), ((0, 0), (0, missing)), constant_values=INVALID)
    return points[:, :MOST_POINTS], labels[:, :MOST_POINTS]


def prompt_points(points=None, labels=None, boxes=None, masks=None) -> tuple[np.ndarray, np.ndarray]:
    """Joins points and boxes into what `efficient_sam_head.decode` takes.

    Args:
      points: [p, n, 2] (x, y) in pixels of the model frame, or None.
      labels: [p, n] 1 foreground, -1 ignore; needed with points.
      boxes: [p, 4] x0, y0, x1, y1 in the same frame, or None.
      masks: None, as in SAM's prompts nothing else is known here.

    Raises:
      InputError: a prompt that EfficientSAM cannot take.
    """
    if masks is not None:
        raise InputError("EfficientSAM takes no mask as a prompt; give points or boxes")
    if points is None and boxes is None:
        raise InputError("EfficientSAM needs a point or a box")
    parts = [] if points is None else [(np.asarray(points, np.float32), np.asarray(labels, np.int32))]
    if any(not np.isin(kinds, (POINT, INVALID)).all() for _, kinds in parts):
        raise InputError("EfficientSAM knows no background points (label 0); leave them out, or use a box")
    if boxes is not None:
        corners = np.asarray(boxes, np.float32).reshape(-1, 2, 2)
        parts.append((corners, np.tile([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]], (len(corners), 1))))
    coordinates, kinds = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    if kinds.shape[1] > MOST_POINTS:
        raise InputError(
            f"EfficientSAM takes {MOST_POINTS} points at most, of which a box is two, not {kinds.shape[1]}"
        )
    return fill_points(coordinates, kinds)


def resize_masks(masks: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
    """Low-resolution logits [..., 4h, 4w] -> [..., h0, w0] float32, bicubic; a mask is where they exceed 0."""
    masks = np.asarray(masks, np.float32)
    rows, columns = (bicubic_matrix(masks.shape[i - 2], original_size[i]) for i in (0, 1))
    resized = np.empty((*masks.shape[:-2], *original_size), np.float32)
    for index in np.ndindex(masks.shape[:-2]):
        resized[index] = separable(rows, columns, masks[index])
    return resized
