"""Selection exactly as SlimSAM's code does it, quirks included. For `recipe="slimsam"` only.

The quirks (file and line of the original in brackets) are what the paper measured, not
what we recommend; `masks.py` has our own rules.
"""

from __future__ import annotations

import numpy as np

from slimsam_jax.pruning.group import Scores
from slimsam_jax.pruning.importance import NORMALIZERS


def normalize(scores: Scores, normalizer: str, heads: int = 1) -> Scores:
    """Normalises each group's scores over `heads` copies of itself.

    The original repeats the score of a channel within a head for all heads before it
    normalises [importance.py:432], which shifts the unbiased deviation a little.
    """
    return {name: NORMALIZERS[normalizer](np.tile(s, heads))[: len(s)] for name, s in scores.items()}


def keep_local(scores: Scores, ratio: float, round_to: int) -> dict[str, np.ndarray]:
    """Rounds the kept width down to a multiple, never up [metapruner.py:201-242]."""
    return {
        name: _all_but(len(s), np.argsort(s, kind="stable")[: _removed(len(s), ratio, round_to)])
        for name, s in scores.items()
    }


def keep_local_tied(scores: Scores, ratio: float, round_to: int, ties: int) -> dict[str, np.ndarray]:
    """Like `keep_local`, but channels c, c + size/ties, c + 2 size/ties, ... stay or go together.

    The original's tracing takes the embedding for `ties` = 12 attention heads, because q, k and v
    read it [metapruner.py:192-199]: of 768 channels only 64 can be chosen freely.
    """
    keep = {}
    for name, score in scores.items():
        period = len(score) // ties
        tied = score.reshape(ties, period).sum(0)
        lowest = np.argsort(tied, kind="stable")[: _removed(len(score), ratio, round_to) // ties]
        keep[name] = _all_but(len(score), (lowest[:, None] + period * np.arange(ties)).ravel())
    return keep


def keep_global(scores: Scores, ratio: float, round_to: int, copies: int = 1) -> dict[str, np.ndarray]:
    """One threshold over all groups [metapruner.py:244-288].

    Two quirks: the removed channels of a group (times `copies`, the heads they are repeated
    for) are rounded down to a multiple of `round_to` by sparing the highest channel numbers,
    not the most important ones; and a group that would lose every channel loses none.

    Args:
      scores: normalised with `normalize`.
    """
    pooled = np.sort(np.concatenate(list(scores.values())))
    threshold = pooled[len(pooled) - int(len(pooled) * (1 - ratio)) - 1]
    keep = {}
    for name, score in scores.items():
        lowest = np.flatnonzero(score <= threshold)
        lowest = lowest[: len(lowest) * copies // round_to * round_to // copies]
        keep[name] = _all_but(len(score), lowest if len(lowest) < len(score) else [])
    return keep


def _removed(size: int, ratio: float, round_to: int) -> int:
    kept = int(size * (1 - ratio))
    return size - (kept - kept % round_to)


def _all_but(size: int, removed) -> np.ndarray:
    return np.setdiff1d(np.arange(size), removed)
