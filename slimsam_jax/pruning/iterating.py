"""Prunes in steps, with training between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.choosing import Ratio, select
from slimsam_jax.pruning.groups import Keep, Scores
from slimsam_jax.pruning.importance import check_choice
from slimsam_jax.pruning.selection import keep_widths

# The share of the whole cut that is made at a share of the steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,  # most at first, while there is much to choose from: Zhu & Gupta 2017
}


def iterate(
    score: Callable[[], Scores],
    ratio: Ratio | Callable[[int], Ratio],
    steps: int,
    schedule: Literal["linear", "cubic"] = "linear",
    **how: Any,
) -> Iterator[dict[str, np.ndarray]]:
    """Selects in steps, each among the channels that the last one left.

    for keep in iterate(lambda: score(params, grouping, criterion="l1"), 0.5, steps=4):
        params = train(mask(params, grouping, keep))

    Args:
      score: asked anew at each step, for the parameters as they are then: of all channels, as masks leave them; or of
        those that are left, as a cut does. The first time of all.
      ratio: share to remove in the end, as `select` takes it; or a function from the step, 1 to `steps`, to the share
        that is gone by then.
      steps: how many.
      schedule: a key of `SCHEDULES`, how the cut of a `ratio` that is no function is spread.
      how: what else `select` takes, but no budget.

    Yields:
      {group: ascending indices among the original channels}, each time within the time before. A group that `score`
      no longer has stays as it was.

    Raises:
      InputError: as `select` raises; no steps; a share that falls; scores of other channels than are left.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if steps < 1 or steps != int(steps):
        raise InputError(f"steps {steps} is not a number of steps, 1 or more")
    if how.get("budget") is not None:
        raise InputError("a budget cannot be spread over steps: give a ratio")
    sizes: dict[str, int] = {}
    keep: dict[str, np.ndarray] = {}
    before: Ratio = 0.0
    for step in range(1, steps + 1):
        share = ratio(step) if callable(ratio) else _scaled(ratio, SCHEDULES[schedule](step / steps))
        if any(gone > _by_pattern(share).get(pattern, 0.0) for pattern, gone in _by_pattern(before).items()):
            raise InputError(f"step {step} asks for {share} after {before}: what is gone does not come back")
        before = share
        scores = score()
        sizes = sizes or {name: of_group.shape[-1] for name, of_group in scores.items()}
        whole, alive = _of_the_original(scores, keep, sizes)
        chosen = select(_ranked(whole, alive), share, **how)
        widths = {name: min(kept.shape[-1], int(alive[name].sum(-1).min())) for name, kept in chosen.items()}
        keep |= keep_widths({name: np.where(alive[name], whole[name], -np.inf) for name in widths}, widths)
        yield dict(keep)


def within(keep: Keep, before: Keep) -> dict[str, np.ndarray]:
    """Where the channels of `keep` lie among those of `before`: what `shrink` takes for parameters cut to `before`.

    Args:
      keep, before: two that `iterate` gave, the later first; `before` may be empty, at the first step.
    """
    return {name: _positions(kept, np.asarray(before[name])) if name in before else kept for name, kept in keep.items()}


def _positions(kept: np.ndarray, before: np.ndarray) -> np.ndarray:
    if before.ndim == 1:
        return np.searchsorted(before, kept)
    return np.array([np.searchsorted(one, own) for one, own in zip(before, kept, strict=True)])


def _scaled(ratio: Ratio, share: float) -> Ratio:
    scaled = {pattern: of_pattern * share for pattern, of_pattern in _by_pattern(ratio).items()}
    return scaled if isinstance(ratio, Mapping) else scaled["*"]


def _by_pattern(ratio: Ratio) -> Mapping[str, float]:
    return ratio if isinstance(ratio, Mapping) else {"*": ratio}


def _of_the_original(scores: Scores, keep: Keep, sizes: Mapping[str, int]) -> tuple[Scores, dict[str, np.ndarray]]:
    """Scores of all original channels, and which of them are left."""
    whole, alive = {}, {}
    for name, score in scores.items():
        if name not in sizes:
            raise InputError(
                f"group {name!r} was not there at the first step: where one comes down to a single channel, those that "
                "are found in the cut function have other names; keep more of it (min_keep), or train under masks"
            )
        size, width = sizes[name], score.shape[-1]
        left = keep[name].shape[-1] if name in keep else size
        if width not in (size, left):
            raise InputError(f"{width} scores of group {name!r}, which has {left} channels left of {size}")
        full = (*score.shape[:-1], size)
        kept = np.broadcast_to(keep.get(name, np.arange(size)), (*score.shape[:-1], left))
        alive[name] = np.zeros(full, bool)
        np.put_along_axis(alive[name], kept, True, -1)
        whole[name] = score
        if width != size:
            whole[name] = np.zeros(full)
            np.put_along_axis(whole[name], kept, score, -1)
    return whole, alive


def _ranked(whole: Scores, alive: Mapping[str, np.ndarray]) -> Scores:
    """The scores, with what is gone below all that are left; not negative where none of them is."""
    lowest = min((score[alive[name]].min() for name, score in whole.items()), default=0.0)
    if lowest >= 0:  # a price needs gains that are not negative, and 0 may be that of a channel that is left
        tiny = np.finfo(np.float64).tiny
        return {name: np.where(alive[name], np.maximum(score, tiny), 0.0) for name, score in whole.items()}
    below = np.nextafter(lowest, -np.inf)
    return {name: np.where(alive[name], score, below) for name, score in whole.items()}
