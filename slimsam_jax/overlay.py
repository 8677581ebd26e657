"""Pictures of masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

COLOURS = np.array([(30, 144, 255), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (227, 190, 50)])


def draw_masks(image: Image.Image, masks: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """Tints each mask in a colour of its own.

    Args:
      image: RGB, h x w.
      masks: [p, h, w] bool; later ones lie on top.
    """
    pixels = np.asarray(image, np.float32).copy()
    for index, mask in enumerate(masks):
        pixels[mask] = (1 - opacity) * pixels[mask] + opacity * COLOURS[index % len(COLOURS)]
    return Image.fromarray(pixels.astype(np.uint8))


def draw_prompts(
    image: Image.Image, points: Sequence[Sequence[float]] = (), boxes: Sequence[Sequence[float]] = (), labels=None
) -> Image.Image:
    """Marks points (x, y; green foreground, red background) and boxes (x0, y0, x1, y1) on a copy."""
    image = image.copy()
    draw, radius = ImageDraw.Draw(image), max(3, max(image.size) // 150)
    for index, (x, y) in enumerate(points):
        fill = (0, 200, 0) if labels is None or labels[index] else (220, 0, 0)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=(255, 255, 255))
    for box in boxes:
        draw.rectangle(tuple(box), outline=(0, 200, 0), width=max(1, radius // 2))
    return image
