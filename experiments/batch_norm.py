"""What batch norm's statistics cost after a cut: the embedding's error with the old ones, and with new ones.

    python -m experiments.batch_norm --model FOLDER --images TRAIN --val VAL

The model is a TinyViT-SAM, such as `experiments.tiny_vit_end_to_end` makes. Its streams are cut, each by the same
share, and nothing is distilled: as it was trained, with statistics that stood still and so are nobody's any more, and
with statistics of its images, as those of a model that was trained with batches' (the published ones).

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
    trained, samples = slimsam_jax.load(options.model), find(list(options.images))
    batches = lambda batch: Batches(samples, trained.config.image_size, batch, options.seed)
    val = [sample.image() for sample in find(list(options.val))[: options.limit]]
    true = again(trained, batches(8), options.counts[-1])
    print(f"uncut, new statistics in place of those it was trained with: {error(true, trained, val):.3f}", flush=True)
    step = Prune("embedding", criterion=options.criterion, allocation="local")
    calibration = lambda name: (batch for _, batch in zip(range(24), batches(1), strict=False))
    for name, sam in (("as trained", trained), ("whose statistics are its images'", true)):
        slim = prune(sam, step, Target(options.ratio), calibration, options.seed)
        print(f"a model {name}, cut by {options.ratio:g}: statistics as they were {error(slim, sam, val):.3f}", end="")
        for count in options.counts:
            print(f", of {count} images {error(again(slim, batches(8), count), sam, val):.3f}", end="", flush=True)
        print(flush=True)


def error(sam: Sam, uncut: Sam, images: list) -> float:
    pairs = ([encode_image(model, image).embedding for model in (sam, uncut)] for image in images)
    return float(np.mean([relative_error(*pair) for pair in pairs]))


def again(slim: Sam, batches: Batches, count: int) -> Sam:
    """With batch norms whose statistics are of so many images."""
    pixels = (preprocess(slim.config, b["image"], b["size"]) for _, b in zip(range(count // 8), batches, strict=False))
    encoder = recalibrate(image_encoder(slim.config), slim.params["image_encoder"], pixels)
    return dataclasses.replace(slim, params={**slim.params, "image_encoder": encoder})


if __name__ == "__main__":
    main(tyro.cli(Options))
