"""Chooses thresholds of everything mode that suit a model, with images that need no labels.

A model's predicted IoU and logits mean what it learned: a threshold that is right for one lets nothing of another pass.
So thresholds are chosen by the share of masks that shall pass, either a usual one or another model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from slimsam_jax.data import Sample
from slimsam_jax.errors import InputError
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.decode import Encoded, encode_image
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.sam import Sam

GRID, IMAGES = 8, 8  # points a side, and images: of a SAM with three masks a point 1536 masks


NAMES = ("pred_iou_thresh", "stability_score_thresh")  # of the thresholds that are chosen


class Scores(NamedTuple):
    """Scores of n masks: predicted IoU [n] and stability [n]."""

    predicted_iou: np.ndarray
    stability: np.ndarray

    def passing(self, thresholds: Thresholds | SamAutomaticMaskGenerator) -> np.ndarray:
        """Tells which masks pass, [n] bool."""
        stable = self.stability >= thresholds.stability_score_thresh
        return stable & _exceeds(self.predicted_iou, thresholds.pred_iou_thresh)


class Shares(NamedTuple):
    """Shares of all masks: those whose predicted IoU passes, and those that are stable enough besides."""

    predicted_iou: float
    both: float


USUAL = Shares(0.2, 0.1)  # the best F0.5 of small v1 against people's segments: `python -m experiments.thresholds`


def calibrate(sam: Sam, samples: Sequence[Sample], like: Sam | None = None, images: int = IMAGES) -> Thresholds | None:
    """Chooses thresholds with which as many masks pass as usual, or as many as of `like` with its own.

    Args:
      samples: images; as many as `images` of them are looked at, spread evenly.
      like: a model, e.g. the teacher of `sam`.

    Returns:
      The thresholds; those of `like`, be they None, if it lets nothing pass, so that there is nothing to go by.

    Raises:
      InputError: not one image can be read, or the model gives no masks to choose from.
    """
    if not like:
        offset = (sam.thresholds or Thresholds()).stability_score_offset
        return fitting(scores(sam, samples, offset, images), USUAL, offset)
    thresholds = like.thresholds or Thresholds()
    offset = thresholds.stability_score_offset
    target = shares(scores(like, samples, offset, images), thresholds)
    return fitting(scores(sam, samples, offset, images), target, offset) if target.both else like.thresholds


def scores(sam: Sam, samples: Sequence[Sample], offset: float = 1.0, images: int = IMAGES) -> Scores:
    """Scores all masks that a model gives for a grid of points.

    Masks are measured in the model's frame, not at the image's size: one program serves images of all sizes.

    Args:
      offset: of stability, in logits.

    Raises:
      InputError: not one image can be read.
    """
    nothing = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    generator = SamAutomaticMaskGenerator(sam, GRID, stability_score_offset=offset, **nothing)
    parts = []
    for encoded in _encoded(sam, samples, images):
        candidates = generator.candidates(encoded._replace(original_size=encoded.size))
        parts.append((candidates.predicted_iou, candidates.stability))
    predicted_iou, stability = (np.concatenate(arrays).astype(np.float64) for arrays in zip(*parts, strict=True))
    return Scores(np.where(np.isfinite(predicted_iou), predicted_iou, -np.inf), stability)


def _encoded(sam: Sam, samples: Sequence[Sample], images: int) -> Iterator[Encoded]:
    """Encodes `images` readable samples, spread over all; in the place of what is not readable the first ones."""
    spread, count = np.unique(np.linspace(0, len(samples) - 1, images).astype(int)).tolist(), 0
    others = (index for index in range(len(samples)) if index not in spread)
    for index in itertools.chain(spread, others):
        try:
            image = samples[index].image()
        except InputError as error:
            last = error
            continue
        yield encode_image(sam, image)
        count += 1
        if count == images:
            return
    if not count:
        raise InputError(f"none of the {len(samples)} images can be read; the last: {last}")


def shares(scored: Scores, thresholds: Thresholds) -> Shares:
    """Computes the shares of masks that pass."""
    one = _exceeds(scored.predicted_iou, thresholds.pred_iou_thresh)
    total = max(1, len(one))
    return Shares(one.sum() / total, scored.passing(thresholds).sum() / total)


def fitting(scored: Scores, target: Shares, offset: float = 1.0) -> Thresholds:
    """Chooses thresholds that these shares of masks pass, up to rounding and ties.

    The one on predicted IoU stays between 0 and 1, also for a model whose estimates do not.

    Raises:
      InputError: there are no masks.
    """
    if not len(scored.stability):
        raise InputError("the model has no masks of different extent, so there are none to choose thresholds by")
    count = max(1, round(target.both * len(scored.stability)))
    predicted = _cut(scored.predicted_iou, max(count, round(target.predicted_iou * len(scored.stability))))
    stable = _cut(scored.stability[_exceeds(scored.predicted_iou, predicted)], count)
    return Thresholds(predicted, stable, offset)


def _cut(values: np.ndarray, count: int) -> float:
    """Returns a number between the `count` greatest values and the rest, within 0..1; 0 if there is no rest."""
    if count >= len(values):
        return 0.0
    ordered = np.sort(values)[::-1]
    return float(np.clip((ordered[count - 1] + ordered[count]) / 2, 0, 1))


def _exceeds(predicted_iou: np.ndarray, threshold: float) -> np.ndarray:
    return (predicted_iou > threshold) | (threshold <= 0)  # as in the generator, 0 lets everything pass
