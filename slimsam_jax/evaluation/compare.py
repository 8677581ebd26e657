"""Measures several models on the same images: each image is read once, and encoded once by each model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from slimsam_jax.data import Sample
from slimsam_jax.data.reading import digest, digest_of_all, map_readable, read_annotated, short_names
from slimsam_jax.data.together import map_together
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.detections import Boxes, Results, segment
from slimsam_jax.evaluation.scores import Protocols, Scores, agreement, image_scores, relative_error, single_mask_iou
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam


class Measured(NamedTuple):
    """Scores of models on each image, by its short name.

    Attributes:
      samples: {image: where it comes from}, of those that were measured on.
      scores: {image: scores of each model}, see `image_scores`.
      results: {image: masks of a detector's boxes by each model}, see `detections.segment`; {} without boxes.
      digest: sha256 of the images and annotations, see `reading.digest`.
      skipped: {name: why it could not be read}.
    """

    samples: dict[str, Sample]
    scores: dict[str, list[Scores]]
    results: dict[str, list[Results]]
    digest: str
    skipped: dict[str, str]


def measure_models(
    sams: Sequence[Sam],
    samples: Sequence[Sample],
    protocols: Protocols,
    boxes: Boxes | None = None,
    max_broken: float = 1.0,
) -> Measured:
    """Measures models by all protocols that an image allows; images that allow none are left out.

    Several processes share the images, and all get the scores of all.

    Args:
      boxes: of a detector, to segment as well.
      max_broken: the share of the samples that may be unreadable.

    Raises:
      InputError: no image is left.
      RunError: more are unreadable.
    """
    names = short_names(samples)

    def measure(sample: Sample) -> tuple[list[Scores], list[Results], str] | None:
        image, annotations = read_annotated(sample)
        if not annotations and "agreement" not in protocols.names and boxes is None:
            return None
        encoded = [encode_image(sam, image) for sam in sams]
        scores = image_scores(sams, encoded, annotations, protocols)
        own = boxes.get(sample.image_id, []) if boxes else []
        results = [segment(sam, e, sample.image_id, own) for sam, e in zip(sams, encoded, strict=True)]
        return scores, results, digest(image, annotations)

    measured, skipped = map_together(measure, samples, "evaluate", max_broken)
    usable = {sample: result for sample, result in measured.items() if result}
    if not usable:
        raise InputError(f"no image can be measured on: {next(iter(skipped.values()), 'none is annotated')}")
    scores, results, digests = zip(*usable.values(), strict=True)
    short = [names[sample] for sample in usable]
    by_name = lambda values: dict(zip(short, values, strict=True))
    return Measured(by_name(usable), by_name(scores), by_name(results), digest_of_all(digests), skipped)


def compare_models(teacher: Sam, slim: Sam, samples: Iterable[Sample], side: int = 4) -> dict[str, Any]:
    """Measures two models on the same images by what takes little time.

    Args:
      side: agreement is over a regular grid of side x side points.

    Returns:
      A dict of
        agreement: mean over images of the mean IoU between the two models' masks for the same
          points; needs no labels.
        embedding_error: mean over images of the squared error of the slim embedding, relative
          to the variance of the teacher's.
        images, annotated_images: how many.
        teacher, slim: {"point": mIoU, "box": mIoU} over the annotated images; {} of none.
        skipped: {name: why it could not be read}.

    Raises:
      InputError: not one image could be read.
    """

    def measure(sample: Sample) -> dict[str, Any]:
        image, annotations = read_annotated(sample)
        pairs = [(sam, encode_image(sam, image)) for sam in (teacher, slim)]
        kinds = ("point", "box") if annotations else ()
        ious = [{kind: single_mask_iou(*pair, annotations, kind) for kind in kinds} for pair in pairs]
        true, slim_embedding = (encoded.embedding for _, encoded in pairs)
        return {
            "agreement": float(agreement(pairs, side)[1].mean()),
            "embedding_error": relative_error(slim_embedding, true),
            "teacher": ious[0],
            "slim": ious[1],
        }

    measured, skipped = map_readable(measure, samples)
    if not measured:
        raise InputError(f"no image can be compared on: {next(iter(skipped.values()), 'none was given')}")
    annotated = [image for image in measured.values() if image["teacher"]]
    mean = lambda images, key: float(np.mean([image[key] for image in images]))
    return {
        **{key: mean(measured.values(), key) for key in ("agreement", "embedding_error")},
        "images": len(measured),
        "annotated_images": len(annotated),
        **{
            name: {kind: mean([image[name] for image in annotated], kind) for kind in ("point", "box") if annotated}
            for name in ("teacher", "slim")
        },
        "skipped": skipped,
    }
