"""The loss of annotated masks: what Taylor importance needs labels for, and Disturbed Taylor does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

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


def annotated(samples: Sequence[Sample]) -> list[Sample]:
    """Those with annotations.

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
    raise InputError(f"signal=masks needs annotated images: {reason}")


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


def _prompts(chosen: Sequence[Annotation], size: tuple[int, int], config: Config) -> dict[str, np.ndarray]:
    xy = np.stack([a.point for a in chosen])[:, None]
    clicks = to_model_frame(xy, size, chosen[0].mask.shape)
    points, labels = prompt_points(clicks, np.ones(clicks.shape[:2], np.int32), None)
    masks = np.zeros((len(chosen), *(4 * side for side in config.grid)), np.float32)
    height, width = (max(1, round(4 * side / config.patch_size)) for side in size)
    for mask, annotation in zip(masks, chosen, strict=True):
        picture = Image.fromarray(annotation.mask.astype(np.float32))
        mask[:height, :width] = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    return {"points": points, "labels": labels, "masks": masks}


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
    likely, unlikely = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    # Focal: what is right already counts little (gamma 2); alpha 0.25 as in RetinaNet.
    focal = 0.25 * target * jnp.exp(2 * unlikely) * likely + 0.75 * (1 - target) * jnp.exp(2 * likely) * unlikely
    share = jnp.exp(likely)
    overlap, total = (share * target).sum((1, 2)), (share + target).sum((1, 2))
    return 20 * -focal.mean() + (1 - (2 * overlap + 1) / (total + 1)).mean()
