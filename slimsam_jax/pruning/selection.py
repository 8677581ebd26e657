"""Selects the channels that stay, by scores and widths, as indices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slimsam_jax.pruning.allocation import gains_of, global_widths, local_widths
from slimsam_jax.pruning.groups import Scores


def keep_widths(scores: Scores, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Keeps the `widths[group]` highest scores of each group (of each of its copies); of equal ones the first."""
    best_first = {name: np.argsort(-score, axis=-1, kind="stable") for name, score in scores.items()}
    return {name: np.sort(order[..., : widths[name]], axis=-1) for name, order in best_first.items()}


def keep_local(scores: Scores, ratio: float, round_to: int = 1) -> dict[str, np.ndarray]:
    """Removes the same share of every group: exactly that many, the lowest scores (see `local_widths`)."""
    return keep_widths(scores, local_widths(gains_of(scores), ratio, round_to))


def keep_global(scores: Scores, ratio: float, round_to: int = 1, min_keep: float = 0.0) -> dict[str, np.ndarray]:
    """Removes a share of the channels of all groups together, the lowest scores (see `global_widths`)."""
    return keep_widths(scores, global_widths(gains_of(scores), ratio, round_to, min_keep))
