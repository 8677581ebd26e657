"""Rounds a layer's weights one input after the other, the rest making up for each error (GPTQ, Frantar et al., 2023).

Inputs go by falling curvature: those that matter most are rounded while the most others can still make up for them.
The scale of each output channel is the best of several, judged by the error of the layer's output after all that, and
then the one that fits its codes best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DAMPING = 0.01  # of the curvature's mean, added to all of it: directions that no data has would be free otherwise
BLOCK = 128  # inputs whose errors reach the later ones together
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the scale with which the largest weight is the greatest code


def error_of(delta: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Mean squared error of each output channel, [outputs], for an error [inputs, outputs] of the weights."""
    return np.einsum("io,io->o", delta, moment @ delta)


def _prepared(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of the inputs, and the upper Cholesky factor of the inverse curvature in that order."""
    diagonal = np.diag(moment)
    mean = diagonal.mean()
    order = np.argsort(-diagonal, kind="stable")
    curvature = moment[np.ix_(order, order)] + (DAMPING * mean if mean > 0 else 1.0) * np.eye(len(moment))
    # The inverse's factor without an inverse: of the reversed matrix' Cholesky factor the inverse, reversed.
    lower = np.linalg.cholesky(curvature[::-1, ::-1])
    return order, np.linalg.inv(lower)[::-1, ::-1]


def _rounded(
    weights: np.ndarray, scale: np.ndarray, levels: tuple[int, int], order: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    left, scale = weights[order].astype(np.float64), scale[order]
    codes = np.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = np.empty((end - start, left.shape[1]))
        for i in range(start, end):
            codes[i] = np.clip(np.round(left[i] / scale[i]), *levels)
            errors[i - start] = (left[i] - codes[i] * scale[i]) / upper[i, i]
            left[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
        left[end:] -= upper[start:end, end:].T @ errors
    found = np.empty_like(codes)
    found[order] = codes
    return found


def search(
    weights: np.ndarray, moment: np.ndarray, largest: np.ndarray, levels: tuple[int, int], factors: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales: of each output channel those with the least error among several scales.

    Args:
      weights: [inputs, outputs].
      moment: [inputs, inputs], the mean of x x^T.
      largest: [groups, outputs], the scales that cut no weight off.
      levels: the least and the greatest code.
      factors: that are tried on them.

    Returns:
      codes [inputs, outputs], scales [groups, outputs], float64.
    """
    order, upper = _prepared(moment)
    spread = lambda scale: np.repeat(scale, len(weights) // len(scale), axis=0)
    best = None
    for factor in factors:
        scale = largest * factor
        codes = _rounded(weights, spread(scale), levels, order, upper)
        scale = fitted(weights, codes, scale, moment) if len(scale) == 1 else scale
        error = error_of(codes * spread(scale) - weights, moment)
        if best is None:
            best = codes, scale, error
            continue
        best = tuple(np.where(error < best[2], new, old) for new, old in zip((codes, scale, error), best, strict=True))
    return best[0], best[1]


def fitted(weights: np.ndarray, codes: np.ndarray, scale: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The scale [1, outputs] with which codes come closest to the weights' output; the given one where all are 0."""
    across = moment @ codes
    power, product = (np.einsum("io,io->o", matrix, across) for matrix in (codes, weights))
    better = (power > 0) & (product > 0)
    return np.where(better, product / np.where(better, power, 1), scale[0])[None]
