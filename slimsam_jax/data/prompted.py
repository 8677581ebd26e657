"""Annotated images with prompts: batches to train a SAM with, and to read importance from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from slimsam_jax.data import Annotation, Sample
from slimsam_jax.data.augment import Framing, draw_framing
from slimsam_jax.data.batches import Batches, Extra
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.data.samples import annotated as with_annotations
from slimsam_jax.errors import InputError, NothingOfUse
from slimsam_jax.imaging.geometry import bounding_window, interior_point
from slimsam_jax.imaging.prompts import noisy, prompt_points
from slimsam_jax.imaging.transforms import to_model_frame
from slimsam_jax.models.config import Config

First = Literal["either", "point", "box"]
LARGEST = 0.9  # share of the image: masks above it are left out, as in the paper's appendix A


class MaskBatches(Batches):
    """Batches of images, each with p of its masks, drawn at random, and a prompt for each.

    Besides `image` and `size`: "points" [b, p, 2, 2] and "labels" [b, p, 2] as the prompt encoder takes them (a
    click and the padding point, or the corners of a box; model frame), "masks" [b, p, 4h, 4w] float32 0..1, and
    "seed" [b] uint32 for what is drawn later. An image with fewer masks shows some of them more than once.

    Args:
      prompts: p.
      flip, crop: see `data.augment.flip_and_crop`.
      first: the kind of the prompts, see `first_prompt`.
      extra: see `Batches`; of whole images, so for no crop.
      start, part, max_broken, workers: see `Batches`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: Config,
        batch: int,
        seed: int,
        prompts: int = 4,
        flip: bool = False,
        crop: float = 1.0,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        max_broken: float = 1.0,
        workers: int = 0,
        first: First = "either",
        extra: Extra | None = None,
    ):
        self.config, self.prompts, self.flip, self.crop, self.first = config, prompts, flip, crop, first
        how = {"max_broken": max_broken, "workers": workers, "frame": config.frame, "extra": extra}
        super().__init__(samples, config.image_size, batch, seed, start, part, **how)

    def _read(self, sample: Sample, random: np.random.Generator) -> dict[str, np.ndarray]:
        image, annotations = read_annotated(sample)
        framing = draw_framing(image.size, self.flip, self.crop, random)
        whole = Framing((0, 0, *image.size), framing.mirrored)
        for framed in (framing, whole):  # a crop may have lost them all
            pixels, size = self.frame.place(framed.of_image(image))
            if chosen := self._choose(annotations, framed, tuple(size), random):
                masks, cells = zip(*(chosen[i % len(chosen)] for i in range(self.prompts)), strict=True)
                points, labels = zip(*(first_prompt(mask, random, self.first) for mask in masks), strict=True)
                points = to_model_frame(np.concatenate(points), size, masks[0].shape)
                seed = random.integers(2**32, dtype=np.uint32)
                prompts = {"points": points, "labels": np.concatenate(labels), "masks": np.stack(cells)}
                more = self.extra(sample, size, random) if self.extra else {}
                return {"image": pixels, "size": size, **prompts, "seed": seed, **more}
        raise NothingOfUse(f"{sample.name} has no annotation to learn from")

    def _choose(
        self, annotations: Sequence[Annotation], framing: Framing, size: tuple[int, int], random: np.random.Generator
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Draws up to p masks, framed, in pixels and in the decoder's cells."""
        chosen: list[tuple[np.ndarray, np.ndarray]] = []
        for i in random.permutation(len(annotations)):
            mask = framing.of_mask(annotations[i].mask)
            if (cells := learnable(mask, size, self.config)) is not None:
                chosen.append((mask, cells))
            if len(chosen) == self.prompts:
                break
        return chosen


def learnable(mask: np.ndarray, size: tuple[int, int], config: Config) -> np.ndarray | None:
    """Returns `coverage` of a mask that can be learned from; None of one that is empty, too large, or lost in cells."""
    if not mask.any() or mask.mean() > LARGEST:
        return None
    cells = coverage(mask, size, config)
    return cells if (cells > 0.5).any() else None


def first_prompt(
    mask: np.ndarray, random: np.random.Generator, first: First = "either"
) -> tuple[np.ndarray, np.ndarray]:
    """Simulates a first prompt: a hand-drawn box or, as often, a click, anywhere or in the middle.

    (The paper's clicks are all anywhere; those that our evaluation and SA-1B's annotations know are in the middle.)

    Args:
      first: "either", or always a "point" or a "box".

    Returns:
      points [1, 2, 2] in pixels of the mask [h, w] and labels [1, 2], as `prompt_points` gives them.
    """
    if (random.random() < 0.5 and first == "either") or first == "box":
        rows, columns = bounding_window(mask)
        box = np.array([columns.start, rows.start, columns.stop, rows.stop], float)
        return prompt_points(boxes=noisy(box, mask.shape, random)[None])
    if random.random() < 0.5:
        click = interior_point(mask)[0]
    else:
        y, x = np.unravel_index(random.choice(np.flatnonzero(mask)), mask.shape)
        click = np.array([x, y]) + 0.5
    return prompt_points(click[None, None], np.ones((1, 1), np.int32))


PROMPTS = 4  # annotations per image


def annotated(samples: Sequence[Sample], user: str = "prune.importance_loss=masks") -> Sequence[Sample]:
    """Returns the samples with annotations.

    Args:
      user: who wants them, for the message.

    Raises:
      InputError: there is none, or not one can be used.
    """
    labelled = with_annotations(samples)
    reason = "there is none"
    for sample in labelled:
        try:
            if read_annotated(sample)[1]:
                return labelled
            reason = f"{sample.name} has none"
        except InputError as error:
            reason = str(error)
    raise InputError(f"{user} needs annotated images: {reason}")


class AnnotatedBatches(Batches):
    """Batches of images with `PROMPTS` of their annotations each, spread over the file.

    Besides `image` and `size`: "points" [b, p, 2, 2] and "labels" [b, p, 2] as the prompt encoder
    takes them (a click and the padding point, model frame), "masks" [b, p, 4h, 4w] float32 0..1.
    """

    def __init__(
        self, samples: Sequence[Sample], config: Config, batch: int, seed: int, part: tuple[int, int] = (0, 1)
    ):
        self.config = config
        super().__init__(annotated(samples), config.image_size, batch, seed, part=part, frame=config.frame)

    def _read(self, sample: Sample, random: np.random.Generator) -> dict[str, np.ndarray]:
        image, annotations = read_annotated(sample)
        if not annotations:
            raise InputError(f"{sample.name} has no annotation")
        chosen = [annotations[i] for i in np.linspace(0, len(annotations) - 1, PROMPTS).astype(int)]
        item = self._item(sample, image, random)
        return item | _prompts(chosen, tuple(item["size"]), self.config)


def random_clicks(size: np.ndarray, count: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws foreground clicks anywhere on an image of [2] `size` in the model frame, as in `AnnotatedBatches`."""
    clicks = random.uniform(0, size[::-1], (count, 1, 2)).astype(np.float32)
    points, labels = prompt_points(clicks, np.ones((count, 1), np.int32))
    return {"points": points, "labels": labels}


def _prompts(chosen: Sequence[Annotation], size: tuple[int, int], config: Config) -> dict[str, np.ndarray]:
    xy = np.stack([a.point for a in chosen])[:, None]
    clicks = to_model_frame(xy, size, chosen[0].mask.shape)
    points, labels = prompt_points(clicks, np.ones(clicks.shape[:2], np.int32), None)
    return {"points": points, "labels": labels, "masks": np.stack([coverage(a.mask, size, config) for a in chosen])}


def coverage(mask: np.ndarray, size: tuple[int, int], config: Config) -> np.ndarray:
    """Resizes a mask [h0, w0] bool to the decoder's output: [4h, 4w] float32, the share of each cell that it covers.

    Args:
      size: the image's in the model frame, from `Frame.place`; what is below and right of it is 0.
    """
    cells = np.zeros([4 * side for side in config.grid], np.float32)
    height, width = (max(1, round(4 * side / config.patch_size)) for side in size)
    image = Image.fromarray(mask.astype(np.float32))
    cells[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    return cells
