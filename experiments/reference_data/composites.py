"""Draws composites: cut-outs and shapes pasted on photographs and textures. All of one follows from its number.

Masks are of what is visible. Where a small cut-out lies on a larger one as its part, there is a mask of the part and
one of the whole, so that a click is as ambiguous as in real life.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter

from experiments.reference_data.pack import listed
from experiments.reference_data.surfaces import Rng, Size, shape, texture
from slimsam_jax.data import Sample
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.geometry import bounding_window, interior_point

SIDE = 256  # the longer one, pixels
SMALLEST = 60  # pixels of a mask that is asked for
OBJECTS = (1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8, 10, 14, 20)  # per image, equally likely

Composite = tuple[Image.Image, list[np.ndarray]]  # RGB, and masks [h, w] bool


@dataclasses.dataclass(frozen=True)
class Material:
    """Files to draw with."""

    cutouts: tuple[Path, ...]
    photographs: tuple[Path, ...]


def samples(pack: Path, part: Literal["train", "val"], count: int, seed: int) -> list[Sample]:
    """Lists composites that are drawn when they are read, the n-th from the number `seed + n`.

    Args:
      pack: from `experiments.reference_data pack`.

    Raises:
      InputError: the pack holds nothing of this part.
    """
    material = Material(*(tuple(listed(pack, kind, part)) for kind in ("cutouts", "photographs")))
    return [_sample(material, part, seed + i) for i in range(count)]


def _sample(material: Material, part: str, number: int) -> Sample:
    read = functools.partial(_encoded, material, part, number)
    return Sample(f"composite_{part}_{number}", lambda: read()[0], lambda: read()[1])


@functools.lru_cache(maxsize=16)  # an image and its annotations are asked for one after the other
def _encoded(material: Material, part: str, number: int) -> tuple[bytes, list[dict[str, Any]]]:
    random = np.random.default_rng([number, part == "val"])
    image, masks = draw(material, random)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(random.integers(35, 96)))
    return buffer.getvalue(), [annotation(i, mask, random) for i, mask in enumerate(masks)]


def annotation(number: int, mask: np.ndarray, random: Rng) -> dict[str, Any]:
    """Makes an annotation as SA-1B's; half of the points are in the middle of the mask, half anywhere in it."""
    rows, columns = bounding_window(mask)
    if random.random() < 0.5:
        x, y = interior_point(mask)[0]
    else:
        y, x = np.unravel_index(random.choice(np.flatnonzero(mask)), mask.shape)
        x, y = x + 0.5, y + 0.5
    box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
    fields = {
        "id": number,
        "bbox": list(map(int, box)),
        "area": int(mask.sum()),
        "point_coords": [[float(x), float(y)]],
    }
    crop = [0, 0, mask.shape[1], mask.shape[0]]
    return fields | {"segmentation": rle.encode(mask), "predicted_iou": 1.0, "stability_score": 1.0, "crop_box": crop}


def write(sample: Sample, out: Path) -> None:
    """Writes composites into a folder in SA-1B's layout."""
    image = sample.image()
    (out / f"{sample.name}.jpg").write_bytes(sample.read())
    fields = {"file_name": f"{sample.name}.jpg", "width": image.width, "height": image.height}
    content = {"image": {"image_id": int(sample.name.rpartition("_")[2]), **fields}}
    (out / f"{sample.name}.json").write_text(json.dumps(content | {"annotations": sample.load_annotations()}))


def draw(material: Material, random: Rng) -> Composite:
    """Draws an image of at most 256 x 256 and at least one mask of it."""
    while True:
        short = SIDE if random.random() < 0.5 else int(SIDE * random.uniform(0.6, 1))
        size = (SIDE, short) if random.random() < 0.5 else (short, SIDE)
        canvas = background(material, size, random)
        layers, wholes = paste_objects(canvas, material, random)
        if masks := visible(layers, wholes):
            return finished(canvas, random), masks


def paste_objects(canvas: Image.Image, material: Material, random: Rng) -> tuple[list[np.ndarray], dict[int, int]]:
    """Pastes onto the canvas; returns opaque pixels [h, w] bool of each, first the lowest, and {part: its whole}."""
    count = random.choice(OBJECTS)
    largest = min(0.8, 1.6 / np.sqrt(count))
    repeated = new_object(material, random) if random.random() < 0.2 else None  # many of a kind side by side
    layers, wholes = [], {}
    for i in range(count):
        item = repeated if repeated and random.random() < 0.8 else new_object(material, random)
        share = random.uniform(0.15, largest) if random.random() < 0.5 else np.exp(random.uniform(-3, np.log(largest)))
        side, centre = max(canvas.size) * share, None
        if layers and random.random() < 0.15 and layers[-1].sum() > 900:  # a part of the one before
            wholes[i] = i - 1
            middle, depth = interior_point(layers[-1])
            side, centre = max(10.0, depth * random.uniform(0.6, 1.4)), middle + random.normal(0, 0.3, 2) * depth
        layers.append(paste(canvas, item, side, centre, random))
    return layers, wholes


def visible(layers: Sequence[np.ndarray], wholes: dict[int, int]) -> list[np.ndarray]:
    """Returns masks of what no later layer covers; a whole has its parts."""
    owner = np.full(layers[0].shape, -1)
    for i, layer in enumerate(layers):
        owner[layer] = i
    masks = [owner == i for i in range(len(layers))]
    joined = []
    for part, whole in wholes.items():
        masks[part] &= layers[whole]  # what hangs over is of neither
        if masks[part].sum() >= SMALLEST and masks[whole].sum() >= SMALLEST:
            joined.append(masks[whole] | masks[part])
    return [mask for mask in [*masks, *joined] if mask.sum() >= SMALLEST]


def new_object(material: Material, random: Rng) -> Image.Image:
    """Draws RGBA: a cut-out, at times with another surface, or a shape."""
    if random.random() < 0.2:
        outline = shape(int(random.integers(48, 160)), random)
        item = surface(material, outline.size, random).convert("RGBA")
        item.putalpha(outline)
        return item
    item = Image.open(material.cutouts[random.integers(len(material.cutouts))]).convert("RGBA")
    if random.random() < 0.25:
        other = surface(material, item.size, random).convert("RGBA")
        other.putalpha(255)
        alpha = item.getchannel("A")
        item = Image.blend(item, other, random.uniform(0.4, 1))
        item.putalpha(alpha)
    return item


def surface(material: Material, size: Size, random: Rng) -> Image.Image:
    """Draws RGB: a piece of a photograph, or a texture."""
    if random.random() < 0.4:
        return texture(size, random)
    photograph = _photograph(material.photographs[random.integers(len(material.photographs))])
    widest = min(photograph.width / size[0], photograph.height / size[1])
    scale = widest * random.uniform(min(1, 0.25 / widest), 1)
    width, height = size[0] * scale, size[1] * scale
    left, top = random.uniform(0, photograph.width - width), random.uniform(0, photograph.height - height)
    piece = photograph.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else piece


@functools.lru_cache(maxsize=512)
def _photograph(path: Path) -> Image.Image:
    image = Image.open(path)
    image.load()
    return image


def background(material: Material, size: Size, random: Rng) -> Image.Image:
    return coloured(surface(material, size, random), random).copy()


def paste(canvas: Image.Image, item: Image.Image, side: float, centre: np.ndarray | None, random: Rng) -> np.ndarray:
    """Pastes an object, its longer side about `side` pixels; returns what it makes opaque, [h, w] bool."""
    warped = warp(item, side, random)
    rgb, alpha = coloured(warped.convert("RGB"), random), warped.getchannel("A")
    if centre is None:
        centre = random.uniform(-0.05, 1.05, 2) * canvas.size
    x, y = (round(c - extent_ / 2) for c, extent_ in zip(centre, warped.size, strict=True))
    if random.random() < 0.4:
        cast_shadow(canvas, alpha, (x, y), side, random)
    canvas.paste(rgb, (x, y), alpha)
    full = Image.new("L", canvas.size)
    full.paste(alpha, (x, y))
    return np.asarray(full) > 127


def warp(item: Image.Image, side: float, random: Rng) -> Image.Image:
    """Warps an object: resized, mirrored, turned, sheared and seen in perspective, in one resampling."""
    stretch = np.exp(random.normal(0, 0.15))
    factor = side / max(item.size)
    # A small copy first: one resampling by much would alias.
    size = [max(3, round(s * factor * k)) for s, k in zip(item.size, (stretch, 1 / stretch), strict=True)]
    item = item.resize(tuple(size), Image.Resampling.BILINEAR, reducing_gap=2)
    if random.random() < 0.5:
        item = item.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = random.uniform(-np.pi, np.pi) if random.random() < 0.4 else random.normal(0, 0.25)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = turn @ [[1, random.normal(0, 0.1)], [0, 1]]
    half = np.array(size) / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half @ turn.T
    corners *= 1 + random.uniform(-0.08, 0.08, (4, 1))
    corners -= corners.min(0)
    target = tuple(int(np.ceil(c)) + 1 for c in corners.max(0))
    source = np.array([[0, 0], [size[0], 0], [size[0], size[1]], [0, size[1]]], float)
    return item.transform(target, Image.Transform.PERSPECTIVE, homography(corners, source), Image.Resampling.BICUBIC)


def homography(here: np.ndarray, there: np.ndarray) -> list[float]:
    """Computes the eight numbers by which Pillow maps four points [4, 2] of the result to those of the source."""
    rows, values = [], []
    for (x, y), (u, v) in zip(here, there, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values)).tolist()


def cast_shadow(canvas: Image.Image, alpha: Image.Image, place: tuple[int, int], side: float, random: Rng) -> None:
    offset = random.uniform(-0.08, 0.12, 2) * side
    dark = alpha.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 0.04 * side + 1)))
    strength = random.uniform(0.2, 0.7)
    dark = dark.point(lambda a: int(a * strength))
    canvas.paste((0, 0, 0), (place[0] + round(offset[0]), place[1] + round(offset[1])), dark)


def coloured(image: Image.Image, random: Rng) -> Image.Image:
    """Changes brightness, contrast, gamma and tint, as one table per channel; at times grey."""
    ramp, gamma = np.linspace(0, 1, 256), np.exp(random.normal(0, 0.2))
    gains, shift = np.exp(random.normal(0, 0.12, 3)), random.normal(0, 0.05)
    contrast = np.exp(random.normal(0, 0.15))
    table = [((ramp**gamma - 0.5) * contrast + 0.5 + shift) * gain * 255 for gain in gains]
    image = image.point(np.concatenate(table).clip(0, 255).astype(np.uint8).tolist())
    return image.convert("L").convert("RGB") if random.random() < 0.05 else image


def finished(canvas: Image.Image, random: Rng) -> Image.Image:
    """Adds the camera's share: blur, noise, and a tint of the whole."""
    if random.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.2)))
    canvas = coloured(canvas, random) if random.random() < 0.5 else canvas
    if random.random() < 0.3:
        noise = random.normal(0, random.uniform(2, 14), (canvas.height, canvas.width, 1))
        canvas = Image.fromarray((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8))
    return canvas
