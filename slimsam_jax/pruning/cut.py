"""Scores, selects, masks and cuts whole trees by the groups of a `Grouping`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.allocation import Costs, TooSmall, allocate, gains_of
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import Keep, Scores, Tree, by_path
from slimsam_jax.pruning.importance import WITHOUT_GRADIENT, Criterion, channel_scores
from slimsam_jax.pruning.selection import keep_global, keep_local, keep_widths
from slimsam_jax.pruning.shrink import apply_masks, mask_tree
from slimsam_jax.pruning.shrink import shrink as shrink_pieces
from slimsam_jax.pruning.unfolding import fold_tree, groups_of_pieces, unfold_tree
from slimsam_jax.pruning.widths import check_keep, own_of

Allocation = Literal["local", "global", "cost"]


def score(
    params: Tree,
    grouping: Grouping,
    gradients: Tree | None = None,
    criterion: Criterion = "taylor",
    own: Collection[str] = (),
    seed: int = 0,
    only: Collection[str] | None = None,
) -> Scores:
    """Scores every channel of every group: the mean over the arrays that vote, see `importance.channel_scores`.

    Kernels vote (what a matrix product or a convolution reads); a group without any is scored by all its members.

    Args:
      params: the tree that was traced.
      gradients: a tree like it, as `gradients.disturbed_gradients` gives; "magnitude" and "random" need none.
      criterion: a key of `importance.CRITERIA`, or "random".
      own: groups that have `copies` and are to be scored for each copy by itself.
      seed: for "random".
      only: names of the groups to score; all of them by default.

    Returns:
      {group: [size], or [copies, size] for those in `own`, float64}.

    Raises:
      InputError: there is no such group, or it has no copies, or the criterion needs gradients.
    """
    if missing := sorted({*own, *(only or ())} - grouping.widths.keys()):
        raise InputError(f"there is no group {missing[0]!r} to score")
    for name in own:
        if not {group.name: group.copies for group in grouping.groups}.get(name):
            raise InputError(f"group {name!r} has no copies that could keep channels of their own")
    if gradients is None and criterion not in WITHOUT_GRADIENT:
        raise InputError(
            f"criterion {criterion!r} needs gradients; without them there are {' and '.join(WITHOUT_GRADIENT)}"
        )
    groups = groups_of_pieces(grouping.groups, grouping.axes, grouping.kernels, own)
    groups = [group for group in groups if only is None or group.name in only]
    weights = unfold_tree(params, grouping)
    slopes = weights if gradients is None else unfold_tree(gradients, grouping)
    return channel_scores(weights, slopes, groups, criterion, seed)


def select(
    scores: Scores,
    ratio: float = 0.5,
    allocation: Allocation = "local",
    round_to: int = 1,
    min_keep: float = 0.0,
    costs: Costs | None = None,
) -> dict[str, np.ndarray]:
    """Chooses the channels that stay.

    Args:
      scores: of `score`; of some groups only, and those are cut.
      ratio: share to remove, 0 <= ratio < 1: of each group ("local"), of all channels ("global"), of what all
        groups cost together ("cost").
      allocation: how the groups share it.
      round_to: every width that stays is a multiple of it.
      min_keep: share of its channels that each group keeps at any rate; for "global" and "cost".
      costs: {group: [size + 1] cost at each width}, for "cost".

    Returns:
      {group: ascending indices, [width] or [copies, width]}.

    Raises:
      InputError: the ratio leaves nothing, or is none.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"ratio {ratio} would leave no channel of a group; it must be from 0 to below 1")
    if not scores:
        raise InputError("there are no groups to cut")
    if allocation == "local":
        return keep_local(scores, ratio, round_to)
    if allocation == "global":
        return keep_global(scores, ratio, round_to, min_keep)
    if allocation != "cost" or costs is None:
        raise InputError(f"allocation is local, global or cost (then with costs=), not {allocation!r}")
    return _select_by_cost(scores, ratio, round_to, min_keep, costs)


def _select_by_cost(scores: Scores, ratio: float, round_to: int, min_keep: float, costs: Mapping[str, np.ndarray]):
    if missing := sorted(scores.keys() - costs.keys()):
        raise InputError(f"costs lack the group {missing[0]!r}")
    total = sum(costs[name][-1] for name in scores)
    try:
        widths = allocate(gains_of(scores), costs, (1 - ratio) * total, round_to, min_keep)
    except TooSmall as error:
        raise InputError(f"ratio {ratio}: {error}") from None
    return keep_widths(scores, widths)


def mask(params: Tree, grouping: Grouping, keep: Keep) -> Tree:
    """Zeroes what is not kept, in every array that has channels of a cut group; shapes stay.

    Args:
      params: the tree that was traced, numpy or JAX.
      keep: {group: ascending indices}; a group that is not named stays whole.

    Raises:
      InputError: unknown groups, indices that are none, a group left empty, another tree.
    """
    keep = check_keep(grouping, keep)
    pieces = unfold_tree(params, grouping)
    ones = mask_tree(pieces, groups_of_pieces(grouping.groups, grouping.axes, (), own_of(keep)), keep)
    return fold_tree(apply_masks(pieces, ones), params, grouping)


def shrink(params: Tree, grouping: Grouping, keep: Keep) -> Tree:
    """Cuts out what is not kept; see `mask` for the arguments and errors. `grouping.run` runs the result."""
    keep = check_keep(grouping, keep)
    pieces = unfold_tree(params, grouping)
    cut = shrink_pieces(pieces, groups_of_pieces(grouping.groups, grouping.axes, (), own_of(keep)), keep)
    small = fold_tree(cut, params, grouping)
    if grouping.traced is not None:
        arrays = by_path(small)
        grouping.traced.made.remember(arrays, {path: arrays[path] for path in pieces}, keep)
    return small
