"""How images come into the model frame and masks back out of it, a class for each way. numpy and Pillow alone.

The *original* frame is the image's own (h0, w0) pixels, the *model* frame the `image_size` that an encoder takes.
A model's `config.frame` is one of these classes. Points are (x, y), sizes (height, width).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.sparse
from PIL import Image

from slimsam_jax.imaging import transforms
from slimsam_jax.imaging.bicubic import bicubic_matrix

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Frame:
    """What every way has in common. Each says `place`, `points` and `mask_matrix`.

    Attributes:
      image_size: (H, W) of the model frame in pixels.
    """

    image_size: Size

    def place(self, image: np.ndarray | Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Brings an image into the model frame.

        Args:
          image: [h0, w0, 3] uint8 RGB, or a PIL image in mode RGB.

        Returns:
          [H, W, 3] uint8, or float32 of the same range, not normalised; and the [2] int32 part of it that is image.
        """
        raise NotImplementedError

    def points(self, xy: np.ndarray, size: Size, original_size: Size) -> np.ndarray:
        """Scales (x, y) from the original to the model frame: [..., 2] -> [..., 2] float32.

        Args:
          size: what `place` gave for the image.
          original_size: its own.
        """
        raise NotImplementedError

    def mask_matrix(self, axis: int, source: int, size: int, original: int) -> scipy.sparse.csr_array:
        """The resizing of one axis of a mask to the original frame, [original, source].

        Args:
          axis: 0 for rows, 1 for columns.
          source: side of the mask as the decoder gives it.
          size, original: the image's sides, see `points`.
        """
        raise NotImplementedError

    def resize_masks(self, masks: np.ndarray, size: Size, original_size: Size) -> np.ndarray:
        """Logits [..., 4h, 4w] of the decoder -> [..., h0, w0] float32; a mask is where they exceed 0."""
        rows, columns = (self.mask_matrix(i, masks.shape[i - 2], size[i], original_size[i]) for i in (0, 1))
        return transforms.resized(masks, rows, columns)


class Fitted(Frame):
    """Segment Anything's: the largest size that fits, top left, the rest padding."""

    def place(self, image: np.ndarray | Image.Image) -> tuple[np.ndarray, np.ndarray]:
        return transforms.resize_and_pad(image, self.image_size)

    def points(self, xy: np.ndarray, size: Size, original_size: Size) -> np.ndarray:
        return transforms.to_model_frame(xy, size, original_size)

    def mask_matrix(self, axis: int, source: int, size: int, original: int) -> scipy.sparse.csr_array:
        return transforms.enlarging(source, self.image_size[axis], size, original)


class Whole(Frame):
    """The whole frame, the aspect lost; `resizing` gives the matrix of an axis, (from, to) pixels."""

    resizing: Callable[[int, int], scipy.sparse.csr_array]

    def place(self, image: np.ndarray | Image.Image) -> tuple[np.ndarray, np.ndarray]:
        channels = np.moveaxis(np.asarray(image, np.float32), -1, 0)
        rows, columns = (self.resizing(channels.shape[i + 1], self.image_size[i]) for i in (0, 1))
        squashed = np.moveaxis(transforms.resized(channels, rows, columns), 0, -1)
        return np.ascontiguousarray(squashed), np.array(self.image_size, np.int32)


class Squashed(Whole):
    """EfficientSAM's: bilinear without antialiasing, and bicubic back."""

    resizing = staticmethod(transforms.bilinear_matrix)

    def points(self, xy: np.ndarray, size: Size, original_size: Size) -> np.ndarray:
        """What is negative becomes -1, as in the original."""
        xy = np.asarray(xy, np.float32)
        scaled = xy * np.float32(self.image_size[::-1]) / np.float32(original_size[::-1])
        return np.where(xy >= 0, scaled, np.float32(-1))

    def mask_matrix(self, axis: int, source: int, size: int, original: int) -> scipy.sparse.csr_array:
        return bicubic_matrix(source, original)


class Stretched(Whole):
    """SAM 2's: bilinear, antialiased where that shrinks, and bilinear back."""

    resizing = staticmethod(transforms.antialiased_matrix)

    def points(self, xy: np.ndarray, size: Size, original_size: Size) -> np.ndarray:
        xy = np.asarray(xy, np.float64) / np.array(original_size[::-1], np.float64)
        return (xy * np.array(self.image_size[::-1], np.float64)).astype(np.float32)

    def mask_matrix(self, axis: int, source: int, size: int, original: int) -> scipy.sparse.csr_array:
        return transforms.bilinear_matrix(source, original)
