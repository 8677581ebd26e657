"""Selects channels exactly as SlimSAM's code does, known bugs included. For `recipe="slimsam"` only.

The quirks (file and line of the original in brackets) are what the paper measured, not
what we recommend; `pruning` has our own rules.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from slimsam_jax.models.sam import Params
from slimsam_jax.pruning.groups import Scores
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


def keep_local_tied(
    scores: Scores, ratio: float, round_to: int, ties: int, decided_by: Literal["all", "first"] = "all"
) -> dict[str, np.ndarray]:
    """Like `keep_local`, but channels c, c + size/ties, c + 2 size/ties, ... stay or go together.

    The original's tracing takes the embedding for `ties` = 12 attention heads, because q, k and v
    read it [metapruner.py:192-199]: of 768 channels only 64 can be chosen freely.

    Args:
      decided_by: by the sum of the tied channels' scores, or, as its criterion "taylor" has it, by
        the first of them alone [importance.py:692-780].
    """
    keep = {}
    for name, score in scores.items():
        period = len(score) // ties
        by_tie = score.reshape(ties, period)
        tied = by_tie.sum(0) if decided_by == "all" else by_tie[0]
        lowest = np.argsort(tied, kind="stable")[: _removed(len(score), ratio, round_to) // ties]
        keep[name] = _all_but(len(score), (lowest[:, None] + period * np.arange(ties)).ravel())
    return keep


def keep_global(
    scores: Scores,
    ratio: float,
    round_to: int,
    copies: int = 1,
    round_by_index: bool = True,
    skip_vanishing: bool = True,
) -> dict[str, np.ndarray]:
    """Selects by one threshold over all groups, ties included [metapruner.py:244-288].

    Args:
      scores: normalised with `normalize`.
      copies: heads that a group's channels are repeated for.
      round_by_index: the removed channels of a group (times `copies`) are rounded down to a multiple of
        `round_to` by sparing the highest channel numbers; if not, the most important of them.
      skip_vanishing: a group that would lose every channel loses none; if not, it keeps its best.
    """
    pooled = np.sort(np.concatenate(list(scores.values())))
    threshold = pooled[len(pooled) - int(len(pooled) * (1 - ratio)) - 1]
    keep = {}
    for name, score in scores.items():
        order = np.arange(len(score)) if round_by_index else np.argsort(score, kind="stable")
        lowest = order[score[order] <= threshold]
        lowest = lowest[: len(lowest) * copies // round_to * round_to // copies]
        if len(lowest) == len(score):
            lowest = [] if skip_vanishing else np.argsort(score, kind="stable")[:-1]
        keep[name] = _all_but(len(score), lowest)
    return keep


def zero_rel_pos(encoder: Params) -> Params:
    """Sets all relative position tables to zero, as the reference does in both stages (prune_funcs.py:39-58)."""
    encoder = dict(encoder)
    for name in (name for name in encoder if name.startswith("blocks_")):
        attn = encoder[name]["attn"]
        zeros = {table: np.zeros_like(attn[table]) for table in ("rel_pos_h", "rel_pos_w")}
        encoder[name] = {**encoder[name], "attn": {**attn, **zeros}}
    return encoder


def _removed(size: int, ratio: float, round_to: int) -> int:
    kept = int(size * (1 - ratio))
    return size - (kept - kept % round_to)


def _all_but(size: int, removed) -> np.ndarray:
    return np.setdiff1d(np.arange(size), removed)
