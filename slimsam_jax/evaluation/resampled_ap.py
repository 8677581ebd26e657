"""Bootstraps COCO AP over images, without matching a mask a second time.

pycocotools has said once which detections are right; a resample only counts an image's as often as it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slimsam_jax.evaluation.bootstrap import LEVEL

RESAMPLES = 1000  # at most: COCO's 5000 images take about three minutes for each choice of masks
RECALLS = np.linspace(0, 1, 101)  # COCO's


class Category(NamedTuple):
    """A category's n detections in all images, the best first.

    Attributes:
      right, wrong: [t, n] bool, by each of COCO's thresholds of IoU; what matches a crowd is neither.
      image: [n] index of the image that each is of.
      objects: [images] number of annotated ones.
    """

    right: np.ndarray
    wrong: np.ndarray
    image: np.ndarray
    objects: np.ndarray


def categories(evaluation: Any) -> list[Category]:
    """Reads the categories of a `COCOeval` that has evaluated: objects of all sizes, where there are any."""
    params = evaluation.params
    table = np.array(evaluation.evalImgs, object).reshape(len(params.catIds), len(params.areaRng), len(params.imgIds))
    return [_category(row) for row in table[:, 0] if any(row)]


def _category(row: Sequence[dict[str, Any] | None]) -> Category:
    """Joins a category's detections of one image after the other, None where there is nothing."""
    known = [(i, image) for i, image in enumerate(row) if image]
    join = lambda name: np.concatenate([image[name] for _, image in known], axis=-1)
    order = np.argsort(-join("dtScores"), kind="stable")  # of equals the first image's, as COCO has it
    matched, ignored = (join(name)[:, order].astype(bool) for name in ("dtMatches", "dtIgnore"))
    image = np.concatenate([np.full(len(image["dtScores"]), i) for i, image in known])[order]
    objects = np.zeros(len(row))
    for i, one in known:
        objects[i] = np.sum(np.asarray(one["gtIgnore"]) == 0)
    return Category(matched & ~ignored, ~matched & ~ignored, image, objects)


def precision(parts: Sequence[Category], times: np.ndarray) -> float:
    """Computes AP as if every image were there so many `times` [images]; NaN if that leaves no object."""
    aps = [_precision(category, times) for category in parts if category.objects @ times]
    return float(np.mean(aps)) if aps else np.nan


def _precision(category: Category, times: np.ndarray) -> float:
    weights = times[category.image]
    right, wrong = (np.cumsum(kind * weights, axis=1) for kind in (category.right, category.wrong))
    recall = right / (category.objects @ times)
    precisions = right / (right + wrong + np.spacing(1))
    highest = np.maximum.accumulate(precisions[:, ::-1], axis=1)[:, ::-1]  # at this recall or beyond
    highest = np.pad(highest, ((0, 0), (0, 1)))  # a recall that is never reached
    return float(np.mean([row[np.searchsorted(r, RECALLS)] for r, row in zip(recall, highest, strict=True)]))


def intervals(models: Sequence[Sequence[Category]], images: int, seed: int, resamples: int) -> np.ndarray:
    """Computes percentile intervals, [2 (AP, difference to the first model's), models, 2].

    All models see the same resamples.
    """
    random, shares = np.random.default_rng(seed), np.full(images, 1 / images)
    draws = (random.multinomial(images, shares) for _ in range(min(resamples, RESAMPLES)))
    aps = np.array([[precision(model, times) for model in models] for times in draws])
    both = np.stack([aps, aps - aps[:, :1]])
    return np.moveaxis(np.nanpercentile(both, [(100 - LEVEL) / 2, (100 + LEVEL) / 2], axis=1), 0, -1)
