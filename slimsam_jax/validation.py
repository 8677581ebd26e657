"""How good a student is while it learns, on images held out. Higher is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from slimsam_jax import metrics
from slimsam_jax.evaluation import (
    annotation_ious,
    encode_image,
    map_readable,
    point_grid,
    predict_masks,
    read_annotated,
)
from slimsam_jax.models.sam import Sam

IMAGES = 50  # as many as the reference validates on
Score = Callable[[Sam], float]


def validator(teacher: Sam, paths: Sequence[Path], measure: str) -> Score:
    """sam -> its score on the first `IMAGES` readable pictures; what the teacher says of them is computed once.

    Args:
      measure: "error": minus the squared error of the embedding relative to the teacher's variance, mean over
        images; or "miou": of the annotated points, or of a grid of points against the teacher's masks where an
        image has no annotation.
    """
    prepare = {"error": _embedding_error, "miou": _miou}[measure]
    found, _ = map_readable(lambda path: prepare(teacher, path), paths[:IMAGES])
    return lambda sam: float(np.mean([score(sam) for score in found.values()]))


def _embedding_error(teacher: Sam, path: Path) -> Score:
    image, _ = read_annotated(path)
    wanted = np.asarray(encode_image(teacher, image).embedding)
    return lambda sam: -metrics.relative_error(encode_image(sam, image).embedding, wanted)


def _miou(teacher: Sam, path: Path) -> Score:
    image, annotations = read_annotated(path)
    if annotations:
        return lambda sam: annotation_ious(sam, encode_image(sam, image), annotations, ("point",))["point"]
    points = point_grid((image.height, image.width), side=4)
    masks, _ = predict_masks(teacher, encode_image(teacher, image), points)
    return lambda sam: float(metrics.iou(predict_masks(sam, encode_image(sam, image), points)[0], masks).mean())
