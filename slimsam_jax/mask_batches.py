"""Annotated pictures to train a SAM with: masks, framed like their picture, and the first prompt of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimsam_jax.data import Annotation, Sample
from slimsam_jax.data.batches import Batches, Framing, draw_framing
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation import read_annotated
from slimsam_jax.evaluation.prompts import noisy
from slimsam_jax.labels import coverage
from slimsam_jax.models.config import Config
from slimsam_jax.models.prompt_encoder import prompt_points
from slimsam_jax.models.sam import resize_and_pad, to_model_frame
from slimsam_jax.regions import deepest, extent

LARGEST = 0.9  # share of the picture: masks above it are left out, as in the paper's appendix A


class MaskBatches(Batches):
    """Batches of pictures, each with p of its masks, drawn at random, and a prompt for each.

    Besides `image` and `size`: "points" [b, p, 2, 2] and "labels" [b, p, 2] as the prompt encoder takes them (a
    click and the padding point, or the corners of a box; model frame), "masks" [b, p, 4h, 4w] float32 0..1, and
    "seed" [b] uint32 for what is drawn later. A picture with fewer masks shows some of them more than once.

    Args:
      prompts: p.
      flip, crop: see `data.batches.flip_and_crop`.
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
    ):
        self.config, self.prompts, self.flip, self.crop = config, prompts, flip, crop
        super().__init__(samples, config.image_size, batch, seed, start, part, max_broken=max_broken, workers=workers)

    def _read(self, sample: Sample, random: np.random.Generator) -> dict[str, np.ndarray]:
        picture, annotations = read_annotated(sample)
        framing = draw_framing(picture.size, self.flip, self.crop, random)
        whole = Framing((0, 0, *picture.size), framing.mirrored)
        for framed in (framing, whole):  # a crop may have lost them all
            image, size = resize_and_pad(framed.of_picture(picture), self.image_size)
            if found := self._choose(annotations, framed, tuple(size), random):
                masks, cells = zip(*(found[i % len(found)] for i in range(self.prompts)), strict=True)
                points, labels = zip(*(first_prompt(mask, random) for mask in masks), strict=True)
                points = to_model_frame(np.concatenate(points), size, masks[0].shape)
                seed = random.integers(2**32, dtype=np.uint32)
                prompts = {"points": points, "labels": np.concatenate(labels), "masks": np.stack(cells)}
                return {"image": image, "size": size, **prompts, "seed": seed}
        raise InputError(f"{sample.name} has no annotation to learn from")

    def _choose(
        self, annotations: Sequence[Annotation], framing: Framing, size: tuple[int, int], random: np.random.Generator
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Up to p masks, framed, in pixels and in the decoder's cells; each fills more than half of a cell."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for i in random.permutation(len(annotations)):
            mask = framing.of_mask(annotations[i].mask)
            cells = coverage(mask, size, self.config) if mask.any() and mask.mean() <= LARGEST else np.zeros(1)
            if (cells > 0.5).any():
                found.append((mask, cells))
            if len(found) == self.prompts:
                break
        return found


def first_prompt(mask: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A box as somebody draws it by hand, or a click, as often; half of the clicks anywhere, half in the middle.

    (The paper's clicks are all anywhere; those that our evaluation and SA-1B's annotations know are in the middle.)

    Returns:
      points [1, 2, 2] in pixels of the mask [h, w] and labels [1, 2], as `prompt_points` gives them.
    """
    if random.random() < 0.5:
        rows, columns = extent(mask)
        box = np.array([columns.start, rows.start, columns.stop, rows.stop], float)
        return prompt_points(boxes=noisy(box, mask.shape, random)[None])
    if random.random() < 0.5:
        click = deepest(mask)[0]
    else:
        y, x = np.unravel_index(random.choice(np.flatnonzero(mask)), mask.shape)
        click = np.array([x, y]) + 0.5
    return prompt_points(click[None, None], np.ones((1, 1), np.int32))
