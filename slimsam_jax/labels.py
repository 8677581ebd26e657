"""The loss of annotated masks: what Taylor importance needs labels for, and Disturbed Taylor does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from slimsam_jax import mask_losses
from slimsam_jax.data import Annotation, Sample
from slimsam_jax.data.batches import Batches
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation import read_annotated
from slimsam_jax.models.config import Config
from slimsam_jax.models.features import run_encoder
from slimsam_jax.models.prompt_encoder import prompt_points
from slimsam_jax.models.sam import Sam, decode, to_model_frame
from slimsam_jax.recipes import Recipe

PROMPTS = 4  # annotations per image


def annotated(samples: Sequence[Sample], user: str = "signal=masks") -> list[Sample]:
    """Those with annotations.

    Args:
      user: who wants them, for the message.

    Raises:
      InputError: there is none, or not one can be used.
    """
    found = [sample for sample in samples if sample.load_annotations]
    reason = "there is none"
    for sample in found:
        try:
            if read_annotated(sample)[1]:
                return found
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
        super().__init__(annotated(samples), config.image_size, batch, seed, part=part)

    def _read(self, sample: Sample, random: np.random.Generator) -> dict[str, np.ndarray]:
        picture, annotations = read_annotated(sample)
        if not annotations:
            raise InputError(f"{sample.name} has no annotation")
        chosen = [annotations[i] for i in np.linspace(0, len(annotations) - 1, PROMPTS).astype(int)]
        item = self._item(sample, picture, random)
        return item | _prompts(chosen, tuple(item["size"]), self.config)


def calibration_stream(
    recipe: Recipe, samples: Sequence[Sample], config: Config, batch: int, seed: int, max_broken: float = 1.0
) -> Batches:
    """What a recipe learns from, to cut by: images, with annotations if it reads those; this process's share."""
    part = jax.process_index(), jax.process_count()
    if recipe.needs_labels:
        # Pictures without annotations are passed over, too, and are not broken: distillation counts those.
        return AnnotatedBatches(samples, config, batch, seed, part)
    return Batches(samples, config.image_size, batch, seed, part=part, max_broken=max_broken)


def random_clicks(size: np.ndarray, count: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Foreground clicks anywhere on a picture of [2] `size` in the model frame, as in `AnnotatedBatches`."""
    clicks = random.uniform(0, size[::-1], (count, 1, 2)).astype(np.float32)
    points, labels = prompt_points(clicks, np.ones((count, 1), np.int32))
    return {"points": points, "labels": labels}


def _prompts(chosen: Sequence[Annotation], size: tuple[int, int], config: Config) -> dict[str, np.ndarray]:
    xy = np.stack([a.point for a in chosen])[:, None]
    clicks = to_model_frame(xy, size, chosen[0].mask.shape)
    points, labels = prompt_points(clicks, np.ones(clicks.shape[:2], np.int32), None)
    return {"points": points, "labels": labels, "masks": np.stack([coverage(a.mask, size, config) for a in chosen])}


def coverage(mask: np.ndarray, size: tuple[int, int], config: Config) -> np.ndarray:
    """A picture's mask [h0, w0] bool as the decoder should give it: [4h, 4w] float32, the share of each cell covered.

    Args:
      size: the picture's in the model frame, from `resize_and_pad`; what is below and right of it is 0.
    """
    cells = np.zeros([4 * side for side in config.grid], np.float32)
    height, width = (max(1, round(4 * side / config.patch_size)) for side in size)
    picture = Image.fromarray(mask.astype(np.float32))
    cells[:height, :width] = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    return cells


def mask_loss(sam: Sam, encoder: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """SAM's loss, 20 focal + dice (Kirillov et al., section 3), of the single mask for one click each.

    Args:
      sam: architecture, prompt encoder and mask decoder.
      encoder: the image encoder's parameters.
      batch: one image, from `AnnotatedBatches`.
    """
    embedding, _ = run_encoder(sam.config, encoder, batch)
    logits, _ = decode(sam.config, sam.params, embedding[0], batch["points"][0], batch["labels"][0])
    logits, target = logits[:, 0], batch["masks"][0]
    return 20 * mask_losses.focal(logits, target).mean() + mask_losses.dice(logits, target).mean()
