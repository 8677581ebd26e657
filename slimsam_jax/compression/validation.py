"""Validates a student while it learns, on images held out. Higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slimsam_jax.data import Sample
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import agreement, relative_error, single_mask_iou
from slimsam_jax.inference.decode import Encoded, encode_image
from slimsam_jax.models.sam import Sam

IMAGES = 50  # as many as the reference validates on
Score = Callable[[Sam], float]


def validator(teacher: Sam, samples: Sequence[Sample], measure: str, unread: dict[str, str] | None = None) -> Score:
    """Makes a function sam -> its score on the first `IMAGES` usable images. The teacher's embeddings are kept.

    Args:
      measure: "error": minus the squared error of the embedding relative to the teacher's variance, mean over
        images; or "miou": of the annotated points, or of a grid of points against the teacher's masks where an
        image has no annotation.
      unread: see `mean_of`.

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
    return mean_of(lambda sam, sample, own: one(sam, teacher, sample, own), known, unread)


def mean_of(
    one: Callable[[Sam, Sample, Any], float | Sequence[float]],
    known: Mapping[Sample, Any],
    unread: dict[str, str] | None = None,
) -> Score:
    """Makes a function sam -> the mean over the images that can still be read; NaN where none can.

    Args:
      one: (sam, sample, what is known of it) -> its score, or of each image as many.
      unread: {name: reason}, to which images are added that cannot be read any more. They are left out from then on.
    """
    unread = {} if unread is None else unread

    def score(sam: Sam) -> float:
        scores = []
        # One by one: `map_readable` has two at a time, beside a training's memory.
        for sample, own in known.items():
            if sample.name not in unread:
                try:
                    scores.append(one(sam, sample, own))
                except InputError as error:
                    unread[sample.name] = str(error)
        return float(np.mean(scores)) if scores else math.nan

    return score


def _embedding_error(sam: Sam, teacher: Sam, sample: Sample, known: Encoded) -> float:
    return -relative_error(encode_image(sam, sample.image()).embedding, known.embedding)


def _miou(sam: Sam, teacher: Sam, sample: Sample, known: Encoded) -> float:
    image, annotations = read_annotated(sample)
    encoded = encode_image(sam, image)
    if annotations:
        return single_mask_iou(sam, encoded, annotations)
    return float(agreement([(teacher, known), (sam, encoded)], grid=4)[1].mean())
