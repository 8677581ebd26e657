"""Draws masks: over their image, and of many images on a sheet."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slimsam_jax.imaging.geometry import bounding_window

COLOURS = [(30, 144, 255), (255, 127, 14), (60, 200, 80), (230, 50, 60), (180, 110, 255), (250, 220, 40)]
SHEET, ROW, GAP, TITLE = 1280, 300, 6, 24  # pixels of a sheet: its width, about the height of its images, between, text


def colours(count: int) -> np.ndarray:
    """Returns distinct colours, [count, 3] RGB, 0..255.

    First come `COLOURS`, then ever new hues at the golden angle, which lie far from those before.
    """
    new = [colorsys.hsv_to_rgb(0.07 + i * 0.618034 % 1, (0.85, 0.55)[i % 2], 1) for i in range(count - len(COLOURS))]
    return np.concatenate([COLOURS, 255 * np.array(new).reshape(-1, 3)])[:count]


def contrasting(pixels: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Chooses for each mask [h, w] the colour that differs most from the pixels [h, w, 3] under it. Returns [p, 3]."""
    palette = colours(max(len(COLOURS), len(masks)))
    free, chosen = np.ones(len(palette), bool), []
    for mask in masks:
        away = np.linalg.norm(palette - pixels[mask].mean(0), axis=1)
        chosen.append(np.where(free, away, -1).argmax())
        free[chosen[-1]] = False
    return palette[chosen]


def draw_masks(
    image: Image.Image, masks: np.ndarray, palette: np.ndarray | None = None, opacity: float = 0.45
) -> Image.Image:
    """Tints each mask in a colour of its own and draws its outline.

    Args:
      image: RGB, h x w.
      masks: [p, h, w] bool; later ones lie on top: a pixel has the colour of the last mask that holds it.
      palette: [p, 3] RGB, 0..255; `colours` if None.
    """
    pixels, palette = np.asarray(image, np.float32), colours(len(masks)) if palette is None else palette
    top, lines = np.full(pixels.shape[:2], -1), np.full(pixels.shape[:2], -1)
    thickness = max(1, round(max(image.size) / 220))
    for index, mask in enumerate(masks):
        window = bounding_window(mask)
        inside = mask[window]
        top[window][inside] = index
        lines[window][inside] = -1  # what is below is hidden, its outline too
        lines[window][outline(inside, thickness)] = index
    for layer, strength in ((top, opacity), (lines, 0.9)):
        alpha = strength * (layer >= 0)[..., None]
        pixels = (1 - alpha) * pixels + alpha * palette[layer] if len(masks) else pixels
    return Image.fromarray(pixels.round().astype(np.uint8))


def outline(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Returns the pixels [h, w] of a mask that are at most `thickness` from its outside; beyond the array all is."""
    from scipy.ndimage import binary_erosion  # slow to import

    return mask & ~binary_erosion(mask, np.ones((3, 3)), thickness) if mask.any() else mask


def draw_prompts(
    image: Image.Image, points: Sequence[Sequence[float]] = (), boxes: Sequence[Sequence[float]] = (), labels=None
) -> Image.Image:
    """Marks points (x, y; green foreground, red background) and boxes (x0, y0, x1, y1) on a copy."""
    image = image.copy()
    draw, radius = ImageDraw.Draw(image), max(3, max(image.size) // 80)
    for index, (x, y) in enumerate(points):
        fill = (0, 200, 0) if labels is None or labels[index] else (220, 0, 0)
        for extra, colour in ((2, (0, 0, 0)), (1, (255, 255, 255)), (-radius // 4, fill)):
            size = radius + extra
            draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    for box in boxes:
        draw.rectangle(tuple(box), outline=(0, 200, 0), width=max(1, radius // 2))
    return image


def sheet(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Lays images out in rows that fill the width, each under its title; blank if there are none.

    Args:
      images: RGB, of any size; each is scaled to the height of its row.
    """
    if not images:
        return Image.new("RGB", (ROW, ROW), "white")
    rows = _rows([image.width / image.height for image in images])
    drawn = [_row([images[i] for i in row], [titles[i] for i in row], len(rows) > 1) for row in rows]
    canvas = Image.new("RGB", (max(row.width for row in drawn), sum(row.height for row in drawn)), "white")
    for i, row in enumerate(drawn):
        canvas.paste(row, (0, sum(above.height for above in drawn[:i])))
    return canvas


def _rows(aspects: Sequence[float]) -> list[list[int]]:
    """Splits images of these aspect ratios into rows that are about equally full. Returns the indices of each row."""
    ends = np.cumsum(aspects)
    count = max(1, round(ends[-1] * ROW / SHEET))
    row_of = ((ends - np.array(aspects) / 2) / ends[-1] * count).astype(int)
    return [list(np.flatnonzero(row_of == row)) for row in range(count) if (row_of == row).any()]


def _row(images: Sequence[Image.Image], titles: Sequence[str], full: bool) -> Image.Image:
    aspects = np.array([image.width / image.height for image in images])
    space = GAP * (len(images) - 1)
    height = min((2 if full else 1) * ROW, (SHEET - space) / aspects.sum())
    edges = np.cumsum([0, *np.maximum(1, aspects * height)]).round().astype(int) + GAP * np.arange(len(images) + 1)
    canvas = Image.new("RGB", (edges[-1] - GAP, TITLE + max(1, round(height)) + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for image, title, left, right in zip(images, titles, edges, edges[1:] - GAP, strict=False):
        draw.text((left + 2, 3), fitted(title, right - left - 4, font), fill=(40, 40, 40), font=font)
        size = (right - left, max(1, round(height)))
        canvas.paste(image.resize(size, Image.Resampling.LANCZOS), (left, TITLE))
    return canvas


def fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shortens a text until it is at most `width` pixels wide."""
    text = text.encode("ascii", "replace").decode()
    while text and font.getlength(text) > width:
        text = text[:-4] + "..." if len(text) > 4 else ""
    return text
