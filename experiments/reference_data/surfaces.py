"""Draws what needs no source: textures, and outlines of plain, thin and holed shapes. All from a random generator."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

Rng = np.random.Generator
Size = tuple[int, int]  # width, height


def texture(size: Size, random: Rng) -> Image.Image:
    """Draws RGB, one of: clouds, cells, stripes, checks, a gradient."""
    kinds = (clouds, cells, stripes, gradient, clouds)
    return kinds[random.integers(len(kinds))](size, random)


def clouds(size: Size, random: Rng) -> Image.Image:
    """Draws noise of several scales added up (value noise, as Perlin's in spirit)."""
    total = np.zeros((size[1], size[0], 3), np.float32)
    roughness, colours = random.uniform(0.3, 0.9), palette(2, random)
    grain = 2 ** random.integers(1, 6)
    for octave in range(4):
        cells_of = grain * 2**octave
        if cells_of > max(size):
            break
        noise = (255 * random.random((cells_of, cells_of))).astype(np.uint8)
        layer = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), np.float32)
        total += (roughness**octave * (layer / 255 - 0.5))[..., None]
    share = (total * random.uniform(0.8, 2) + 0.5).clip(0, 1)
    return as_image(colours[0] * share + colours[1] * (1 - share))


def cells(size: Size, random: Rng) -> Image.Image:
    """Draws Voronoi cells in a few colours."""
    count = int(random.integers(4, 60))
    seeds, colours = random.random((count, 2)) * size, palette(count, random)
    small = max(1, size[0] // 2), max(1, size[1] // 2)
    x, y = np.meshgrid(np.linspace(0, size[0], small[0]), np.linspace(0, size[1], small[1]))
    nearest = ((x[..., None] - seeds[:, 0]) ** 2 + (y[..., None] - seeds[:, 1]) ** 2).argmin(-1)
    return as_image(colours[nearest]).resize(size, Image.Resampling.BICUBIC)


def stripes(size: Size, random: Rng) -> Image.Image:
    """Draws stripes or checks at any angle, hard or soft."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    angle, period = random.uniform(0, np.pi), random.uniform(4, max(size) / 2)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    if random.random() < 0.4:
        wave *= np.sin((y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period)
    share = (wave * random.choice([0.5, 2, 20]) / 2 + 0.5).clip(0, 1)[..., None]
    colours = palette(2, random)
    return as_image(colours[0] * share + colours[1] * (1 - share))


def gradient(size: Size, random: Rng) -> Image.Image:
    """Draws from one colour to another; at times only one."""
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    angle = random.uniform(0, 2 * np.pi)
    away = np.hypot(x, y) if random.random() < 0.3 else x * np.cos(angle) + y * np.sin(angle)
    share = (away * random.choice([0.0, 0.4, 0.8]) + 0.5).clip(0, 1)[..., None]
    colours = palette(2, random)
    return as_image(colours[0] * share + colours[1] * (1 - share))


def palette(count: int, random: Rng) -> np.ndarray:
    """Draws colours, [count, 3] 0..255, most of them pale or dull, at times all of one hue."""
    colours = random.uniform(0, 255, (count, 3))
    colours += (colours.mean(1, keepdims=True) - colours) * random.uniform(0, 1)
    if random.random() < 0.4:
        colours = colours[:1] + random.uniform(-60, 60, (count, 1))
    return colours


def as_image(pixels: np.ndarray) -> Image.Image:
    """[h, w, 3] 0..255."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shape(side: int, random: Rng) -> Image.Image:
    """Draws the outline of a shape, "L": 255 inside. Drawn at four times the size, so that edges are smooth."""
    s = 4 * side
    image = Image.new("L", (s, s))
    draw = ImageDraw.Draw(image)
    kind = random.integers(6)
    if kind == 0:
        draw.ellipse((0, 0, s, s), 255)
    elif kind == 1:
        draw.rounded_rectangle((0, 0, s, s), s * random.uniform(0, 0.4), 255)
    elif kind == 2:  # a polygon of random radii: convex, starred or anything between
        corners = int(random.integers(3, 12))
        angles = np.sort(random.uniform(0, 2 * np.pi, corners))
        radii = random.uniform(random.uniform(0.2, 0.9), 1, corners) * s / 2
        draw.polygon([(s / 2 + r * np.cos(a), s / 2 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)], 255)
    elif kind == 3:  # a ring or a frame
        hole = s * random.uniform(0.1, 0.4)
        outline = draw.ellipse if random.random() < 0.6 else draw.rectangle
        outline((0, 0, s, s), 255)
        outline((hole, hole, s - hole, s - hole), 0)
    elif kind == 4:  # a bent line
        points = (random.random((int(random.integers(2, 5)), 2)) * 0.9 + 0.05) * s
        draw.line([tuple(p) for p in points], 255, max(8, round(s * random.uniform(0.03, 0.12))), "curve")
    else:  # a blob
        noise = Image.fromarray((255 * random.random((5, 5))).astype(np.uint8)).resize((s, s), Image.Resampling.BICUBIC)
        draw.ellipse((0, 0, s, s), 255)
        image = Image.fromarray(np.where(np.asarray(noise) > 90, np.asarray(image), 0).astype(np.uint8))
    return image.resize((side, side), Image.Resampling.BOX)
