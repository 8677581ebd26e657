"""How an image's time grows with the number of prompts: a SAM decodes each, a FastSAM chooses among masks it has.

    python -m experiments.prompts --model SAM FASTSAM --images PHOTOS

Of each model and image: encoding and so many points, each to one mask of the image's size; and everything mode.
CPU seconds of this process, mean over images once all is compiled: the clock says nothing on a busy machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from PIL import Image

import slimsam_jax
from slimsam_jax import data, everything
from slimsam_jax.evaluation import tables
from slimsam_jax.imaging.prompts import clicks_at
from slimsam_jax.inference.decode import decode_prompts, encode_image, original_masks
from slimsam_jax.models.kinds import Model


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
      images: photographs; those in the package if none.
      counts: of points, spread evenly over the image.
      points_per_side: of everything mode's grid, of which a FastSAM knows nothing.
    """

    model: tuple[Path, ...]
    images: tuple[str, ...] = ()
    counts: tuple[int, ...] = (1, 10, 100)
    limit: int = 4
    points_per_side: int = 32


def main(options: Options) -> None:
    photos = [s.image() for s in data.find(options.images or [str(data.embedded_images())])[: options.limit]]
    rows = [row(path, photos, options) for path in options.model]
    heads = ["CPU s an image", *(f"{count} points" for count in options.counts), "everything", "its masks"]
    print(tables.markdown_rows(heads, rows))


def row(path: Path, photos: list[Image.Image], options: Options) -> list[str]:
    model = slimsam_jax.load(path)
    times = [seconds(lambda photo, n=count: segment(model, photo, n), photos)[0] for count in options.counts]
    how = everything.Options(path, (), path, points_per_side=options.points_per_side)
    if model.family == "fast_sam":
        how = everything.Options(path, (), path)
    cost, masks = seconds(everything.generator_of(model, how).generate, photos)
    return [path.name, *(f"{value:.3f}" for value in (*times, cost)), f"{np.mean(list(map(len, masks))):.1f}"]


def segment(model: Model, photo: Image.Image, count: int) -> list[np.ndarray]:
    """Encodes an image, and gives the single mask of so many points."""
    encoded, side = encode_image(model, photo), int(np.ceil(count**0.5))
    y, x = np.divmod(np.arange(count), side)
    points = (np.stack([x, y], axis=-1) + 0.5) / side * photo.size
    low, _ = decode_prompts(model, encoded, clicks_at(points))
    return [original_masks(model, encoded, each[0]) for each in low]


def seconds(run: Callable[[Image.Image], Any], photos: list[Image.Image]) -> tuple[float, list[Any]]:
    """CPU seconds of each call, and what they give; first ones compile, once for each shape of photographs."""
    for photo in photos:
        run(photo)
    start = time.process_time()
    results = [jax.block_until_ready(run(photo)) for photo in photos]
    return (time.process_time() - start) / len(photos), results


if __name__ == "__main__":
    main(tyro.cli(Options))
