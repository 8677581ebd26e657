"""Summarises scores over images: means, and bootstrap intervals, how far other images might have moved them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimsam_jax.evaluation.scores import Scores

LEVEL = 95  # per cent
RESAMPLES = 10_000
DRAWS = 4_000_000  # at a time: bounds memory


def as_table(scores: Sequence[Sequence[Scores]]) -> tuple[list[str], np.ndarray]:
    """Tabulates scores per image and model. Returns keys, and [models, images, keys]; NaN where there is no score."""
    keys = list(dict.fromkeys(key for image in scores for model in image for key in model))
    table = np.full((len(scores[0]), len(scores), len(keys)), np.nan)
    for i, image in enumerate(scores):
        for m, model in enumerate(image):
            for key, value in model.items():
                table[m, i, keys.index(key)] = value
    return keys, table


def summarise(scores: Sequence[Sequence[Scores]], seed: int, resamples: int = RESAMPLES) -> dict[str, list[dict]]:
    """Summarises scores of each image by each model, as means with intervals.

    Returns {key: per model {"mean", "interval", "images"}, and after the first "difference" to it with its interval}.

    Intervals are of the percentile bootstrap over images. All models and scores see the same resamples, so a
    difference is paired.
    """
    keys, table = as_table(scores)
    if not keys:
        return {}
    differences = table - table[:1]
    both = np.concatenate([table, differences])
    images, columns = table.shape[1], len(keys)
    low, high = bootstrap(both.transpose(1, 0, 2).reshape(images, -1), seed, resamples).reshape(2, 2, -1, columns)
    summary: dict[str, list[dict]] = {}
    for k, key in enumerate(keys):
        for m in range(len(table)):
            one = {
                "mean": float(np.nanmean(table[m, :, k])),
                "interval": [float(low[0, m, k]), float(high[0, m, k])],
                "images": int(np.isfinite(table[m, :, k]).sum()),
            }
            if m:
                one["difference"] = float(np.nanmean(differences[m, :, k]))
                one["difference_interval"] = [float(low[1, m, k]), float(high[1, m, k])]
            summary.setdefault(key, []).append(one)
    return summary


def bootstrap(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Computes percentile intervals of the means of columns: [images, m], NaN where there is no value, -> [2, m]."""
    random, (images, columns) = np.random.default_rng(seed), values.shape
    known, values = np.isfinite(values).astype(float), np.nan_to_num(values)
    means = np.empty((resamples, columns))
    step = max(1, DRAWS // images)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = random.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(float)
        with np.errstate(invalid="ignore"):  # a resample may miss all images that have a score
            means[start : start + rows] = (times @ values) / (times @ known)
    return np.nanpercentile(means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2], axis=0)
