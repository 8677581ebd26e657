"""Chooses a basis before the cut: closed-form slimming of linear maps, in float64.

Pruning drops coordinates, and the coordinates of a network are an accident of its
initialisation. Where its function does not change under a change of basis, the part
dropped in the right basis is far smaller. Plain linear algebra on second moments; it knows
neither transformers nor trees. Vectors are columns: a map A takes x to A x.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def residual_basis(moment: np.ndarray, width: int) -> np.ndarray:
    """Returns the best `width`-dimensional coordinates of a residual stream that LayerNorms read, [width, D].

    LayerNorm centres along the all-ones direction, so that direction must stay the
    all-ones direction: the others are the leading ones of what it leaves.

    Args:
      moment: [D, D] sum of x xᵀ over stream vectors x, each centred and scaled as LayerNorm does.
      width: d <= D.

    Returns:
      Q: [d, D] with orthonormal rows; Qᵀ Q x ~ x, and the mean of Q x is sqrt(D / d) that of x.
    """
    size = len(moment)
    ones = np.full(size, size**-0.5)
    _, vectors = np.linalg.eigh(_centred(moment))
    # Zero eigenvalues come in any basis, the all-ones direction mixed in: take it out before choosing.
    directions, _ = np.linalg.qr(np.column_stack([ones, vectors[:, ::-1][:, : size - 1]]))
    directions = directions * _signs(directions)  # the first column, all ones, becomes positive
    return _reflection(width) @ directions[:, :width].T


def rotated_basis(moment: np.ndarray, width: int) -> np.ndarray:
    """Returns the best `width`-dimensional coordinates of vectors that any rotation leaves the same, [width, D].

    Args:
      moment: [D, D] sum of x xᵀ.
      width: d <= D.

    Returns:
      Q: [d, D] with orthonormal rows, the leading directions first; Qᵀ Q x ~ x.
    """
    _, vectors = np.linalg.eigh(moment)
    directions = vectors[:, ::-1][:, :width]
    return (directions * _signs(directions)).T


def residual_spectrum(moment: np.ndarray) -> np.ndarray:
    """Returns shares of the stream's variance, [D], falling; a basis of width d carries d - 1 of them, and the mean."""
    values = np.maximum(np.linalg.eigvalsh(_centred(moment))[::-1], 0)
    return values / values.sum()


def _centred(moment: np.ndarray) -> np.ndarray:
    centre = np.eye(len(moment)) - 1 / len(moment)
    return centre @ moment @ centre


def _reflection(width: int) -> np.ndarray:
    """Returns the Householder reflection [width, width] that swaps the first axis and the all-ones direction."""
    normal = np.eye(width)[0] - width**-0.5
    length = normal @ normal
    return np.eye(width) - (2 * np.outer(normal, normal) / length if length > 1e-12 else 0)


class Bilinear(NamedTuple):
    """Maps of the two sides of a bilinear form, the dimensions that matter most first, and its singular values."""

    left: np.ndarray
    right: np.ndarray
    singular_values: np.ndarray


def bilinear_basis(left: np.ndarray, right: np.ndarray) -> Bilinear:
    """Returns coordinates whose first r are the best approximation of q·k of rank r, under second moments of q and k.

    Args:
      left, right: [m, m] second moments E[q qᵀ], E[k kᵀ].

    Returns:
      `left` A and `right` B, [m, m], with (A q)·(B k) = q·k; their first r rows give the approximation.
    """
    left_root, left_inverse = _roots(left)
    right_root, right_inverse = _roots(right)
    u, s, vt = np.linalg.svd(left_root @ right_root)
    signs, scale = _signs(u)[:, None], np.sqrt(s)[:, None]
    return Bilinear(scale * signs * (u.T @ left_inverse), scale * signs * (vt @ right_inverse), s)


class Compression(NamedTuple):
    """x ~ mean + decode (encode (x - mean)), and the singular values of what the reader sees."""

    encode: np.ndarray
    decode: np.ndarray
    singular_values: np.ndarray


def output_basis(covariance: np.ndarray, reader: np.ndarray) -> Compression:
    """Returns coordinates whose first r are the best r numbers to pass from a vector x to a linear reader W.

    Args:
      covariance: [m, m] of x.
      reader: [m, m] Wᵀ W: how much an error of x hurts.

    Returns:
      encode [m, m] and decode [m, m], each other's inverse; use the first r rows and columns.
    """
    reader_root, inverse = _roots(reader)
    u, s, _ = np.linalg.svd(reader_root @ root(covariance))
    u = u * _signs(u)
    encode, decode = u.T @ reader_root, inverse @ u
    # Both sides of a channel get the same norm. The product is the same, but training is not: a tiny kernel before a
    # huge one is wrecked by the first step of an optimizer like Adam, whose steps do not know the scale.
    balance = np.sqrt(np.linalg.norm(decode, axis=0) / np.linalg.norm(encode, axis=1))
    return Compression(balance[:, None] * encode, decode / balance, s)


def _signs(vectors: np.ndarray) -> np.ndarray:
    """Returns the sign of each column's largest entry: decompositions leave it open, and results should not."""
    largest = np.abs(vectors).argmax(axis=0)
    return np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def root(matrix: np.ndarray) -> np.ndarray:
    """Returns the symmetric square root of a positive semidefinite matrix."""
    return _roots(matrix)[0]


def _roots(matrix: np.ndarray, smallest: float = 1e-10) -> tuple[np.ndarray, np.ndarray]:
    """Returns symmetric square root and its inverse; eigenvalues are raised to a share of the largest."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.sqrt(np.maximum(values, smallest * max(values.max(), 1e-30)))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def choose_units(
    covariance: np.ndarray, weights: np.ndarray, count: int | None = None, rounds: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Orders hidden units so that the next ones best explain the layer's output given those before.

    A nonlinearity forbids a change of basis, so units are chosen, greedily: the gain of a unit
    is how much the squared error of the output falls when the output is refitted on it too.
    Units of one round are chosen together, as if they did not overlap.

    Args:
      covariance: [M, M] of the activations.
      weights: [M, D] of the layer that reads them, output = activations @ weights.
      count: how many at least to choose, the first of the order; None for all M. Few are chosen sooner.
      rounds: that all M take. M of them would be plain greedy, at M times the cost of one.

    Returns:
      order [count or a few more], best first, and their gains in that order, made not to rise.
    """
    size = len(covariance)
    count = size if count is None else count
    # What the chosen units leave unexplained is covariance - factor factorᵀ, of which only columns are ever needed.
    factor, used = np.zeros((size, size)), 0
    variance, explained = np.diag(covariance).astype(np.float64), covariance @ weights
    # Activations were summed in float32: less variance than this is rounding.
    floor = 1e-7 * max(variance.max(), 1e-30)
    left, order, gains = np.ones(size, bool), [], []
    while left.sum() > size - count:
        gain = np.where(variance > floor, (explained**2).sum(1) / np.maximum(variance, floor), 0.0)
        units = np.argsort(-np.where(left, gain, -1.0), kind="stable")[: min(-(-size // rounds), left.sum())]
        left[units] = False
        order.append(units)
        gains.append(gain[units])
        residual = covariance[:, units] - factor[:, :used] @ factor[units, :used].T
        values, vectors = np.linalg.eigh(residual[units])
        real = values > floor  # what units of one round share, they explain once
        columns = residual @ (vectors[:, real] / np.sqrt(values[real]))
        factor[:, used : used + columns.shape[1]] = columns
        used += columns.shape[1]
        variance = variance - (columns**2).sum(1)
        explained = explained - columns @ (columns.T @ weights)
    return np.concatenate(order), np.minimum.accumulate(np.concatenate(gains))


def refit(covariance: np.ndarray, mean: np.ndarray, weights: np.ndarray, kept: np.ndarray, ridge: float = 1e-6):
    """Refits a layer by least squares on the kept units alone.

    Args:
      covariance, mean: of all units' activations.
      weights: [M, D], output = activations @ weights.
      kept: indices of the units that stay.
      ridge: relative to the mean variance of the kept.

    Returns:
      new weights [kept, D], and what to add to the output's bias [D].
    """
    inner = covariance[np.ix_(kept, kept)]
    inner = inner + ridge * np.trace(inner) / len(kept) * np.eye(len(kept))
    new = np.linalg.solve(inner, covariance[kept] @ weights)
    return new, mean @ weights - mean[kept] @ new
