"""Flips and crops an image, and the masks annotated in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


def flip_and_crop(flip: bool, crop: float) -> Augment | None:
    """Makes a function that mirrors half of the images, and crops sides to `crop` to 1 of theirs; None for neither."""
    if not flip and crop == 1:
        return None

    return lambda image, random: draw_framing(image.size, flip, crop, random).of_image(image)


class Framing(NamedTuple):
    """The part of an image that is shown: left, top, right and bottom in pixels, and whether it is mirrored then."""

    box: tuple[int, int, int, int]
    mirrored: bool

    def of_image(self, image: Image.Image) -> Image.Image:
        image = image.crop(self.box)
        return ImageOps.mirror(image) if self.mirrored else image

    def of_mask(self, mask: np.ndarray) -> np.ndarray:
        """Frames a mask [h, w] of the same image."""
        left, top, right, bottom = self.box
        return mask[top:bottom, left:right][:, :: -1 if self.mirrored else 1]


def draw_framing(size: tuple[int, int], flip: bool, crop: float, random: np.random.Generator) -> Framing:
    """Draws a framing for an image of (width, height); see `flip_and_crop`."""
    sides = [max(1, round(side * random.uniform(crop, 1))) for side in size]
    left, top = (int(random.integers(whole - side + 1)) for whole, side in zip(size, sides, strict=True))
    return Framing((left, top, left + sides[0], top + sides[1]), flip and random.random() < 0.5)
