"""What batch norm's statistics cost after a cut: the embedding's error with the old ones, and with new ones.

    python -m experiments.batch_norm --model FOLDER --images TRAIN --val VAL

The model is a TinyViT-SAM, such as `experiments.tiny_vit_end_to_end` makes. Its streams are cut, nothing is distilled.
The error is that against the uncut model, relative to the variance of its embedding, mean over the images of `val`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tyro

import slimsam_jax
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.prune import prune
from slimsam_jax.compression.steps import Prune
from slimsam_jax.data import find
from slimsam_jax.data.batches import Batches
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.encoders.layers import recalibrate
from slimsam_jax.models.sam import Sam, image_encoder, preprocess


@dataclasses.dataclass(frozen=True)
class Options:
    """What to cut and measure.

    Attributes:
      criterion: "magnitude" needs no images for the cut itself.
      counts: images that new statistics are estimated from, in batches of 8.
    """

    model: Path
    images: tuple[str, ...]
    val: tuple[str, ...]
    ratio: float = 0.5
    criterion: str = "magnitude"
    counts: tuple[int, ...] = (8, 64)
    limit: int = 20
    seed: int = 0


def main(options: Options) -> None:
    sam, samples = slimsam_jax.load(options.model), find(list(options.images))
    step = Prune("embedding", criterion=options.criterion, allocation="global")
    batches = lambda batch: Batches(samples, sam.config.image_size, batch, options.seed)
    calibration = lambda name: (batch for _, batch in zip(range(24), batches(1), strict=False))
    slim = prune(sam, step, Target(options.ratio), calibration, options.seed)
    models = {"as they were": slim} | {f"of {count} images": again(slim, batches(8), count) for count in options.counts}
    val = [sample.image() for sample in find(list(options.val))[: options.limit]]
    wanted = [encode_image(sam, image).embedding for image in val]
    for name, model in models.items():
        errors = [relative_error(encode_image(model, i).embedding, e) for i, e in zip(val, wanted, strict=True)]
        print(f"{options.criterion}, ratio {options.ratio:g}, statistics {name}: {np.mean(errors):.3f}", flush=True)


def again(slim: Sam, batches: Batches, count: int) -> Sam:
    """With batch norms whose statistics are of so many images."""
    pixels = (preprocess(slim.config, b["image"], b["size"]) for _, b in zip(range(count // 8), batches, strict=False))
    encoder = recalibrate(image_encoder(slim.config), slim.params["image_encoder"], pixels)
    return dataclasses.replace(slim, params={**slim.params, "image_encoder": encoder})


if __name__ == "__main__":
    main(tyro.cli(Options))
