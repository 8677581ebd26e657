"""How good a student is while it learns, on images held out. Higher is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from slimsam_jax import metrics
from slimsam_jax.data import read_image
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation import (
    Encoded,
    annotation_ious,
    encode_image,
    point_grid,
    predict_masks,
    read_annotated,
)
from slimsam_jax.models.sam import Sam

IMAGES = 50  # as many as the reference validates on
Score = Callable[[Sam], float]


def validator(teacher: Sam, paths: Sequence[Path], measure: str) -> Score:
    """sam -> its score on the first `IMAGES` usable pictures. The teacher's embeddings are computed once and kept.

    Args:
      measure: "error": minus the squared error of the embedding relative to the teacher's variance, mean over
        images; or "miou": of the annotated points, or of a grid of points against the teacher's masks where an
        image has no annotation.

    Raises:
      InputError: not one picture can be used.
    """
    one = {"error": _embedding_error, "miou": _miou}[measure]
    known: dict[Path, Encoded] = {}
    for path in paths:
        try:
            known[path] = encode_image(teacher, read_annotated(path)[0])
        except InputError as error:
            reason = error
        if len(known) == IMAGES:
            break
    if not known:
        raise InputError(f"no image can be validated on: {reason}")
    return lambda sam: float(np.mean([one(sam, teacher, path, encoded) for path, encoded in known.items()]))


def _embedding_error(sam: Sam, teacher: Sam, path: Path, known: Encoded) -> float:
    return -metrics.relative_error(encode_image(sam, read_image(path)).embedding, known.embedding)


def _miou(sam: Sam, teacher: Sam, path: Path, known: Encoded) -> float:
    image, annotations = read_annotated(path)
    encoded = encode_image(sam, image)
    if annotations:
        return annotation_ious(sam, encoded, annotations, ("point",))["point"]
    points = point_grid(known.original_size, side=4)
    masks = (predict_masks(*pair, points)[0] for pair in ((sam, encoded), (teacher, known)))
    return float(metrics.iou(*masks).mean())
