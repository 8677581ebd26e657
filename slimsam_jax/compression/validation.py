"""Validates a student while it learns, on images held out. Higher is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from slimsam_jax.data import Sample
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import agreement, relative_error, single_mask_iou
from slimsam_jax.inference.decode import Encoded, encode_image
from slimsam_jax.models.sam import Sam

IMAGES = 50  # as many as the reference validates on
Score = Callable[[Sam], float]


def validator(teacher: Sam, samples: Sequence[Sample], measure: str) -> Score:
    """Makes a function sam -> its score on the first `IMAGES` usable images. The teacher's embeddings are kept.

    Args:
      measure: "error": minus the squared error of the embedding relative to the teacher's variance, mean over
        images; or "miou": of the annotated points, or of a grid of points against the teacher's masks where an
        image has no annotation.

    Raises:
      InputError: not one image can be used.
    """
    one = {"error": _embedding_error, "miou": _miou}[measure]
    known: dict[Sample, Encoded] = {}
    for sample in samples:
        try:
            known[sample] = encode_image(teacher, read_annotated(sample)[0])
        except InputError as error:
            reason = error
        if len(known) == IMAGES:
            break
    if not known:
        raise InputError(f"no image can be validated on: {reason}")
    return lambda sam: float(np.mean([one(sam, teacher, sample, encoded) for sample, encoded in known.items()]))


def _embedding_error(sam: Sam, teacher: Sam, sample: Sample, known: Encoded) -> float:
    return -relative_error(encode_image(sam, sample.image()).embedding, known.embedding)


def _miou(sam: Sam, teacher: Sam, sample: Sample, known: Encoded) -> float:
    image, annotations = read_annotated(sample)
    encoded = encode_image(sam, image)
    if annotations:
        return single_mask_iou(sam, encoded, annotations)
    return float(agreement([(teacher, known), (sam, encoded)], grid=4)[1].mean())
