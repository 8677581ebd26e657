"""Scores, masks and cuts whole trees by the groups of a `Grouping`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import Keep, Scores, Tree, by_path
from slimsam_jax.pruning.importance import (
    CHOICES,
    NORMALIZERS,
    WITHOUT_GRADIENT,
    Criterion,
    Normalizer,
    Reduction,
    channel_scores,
    check_choice,
)
from slimsam_jax.pruning.patterns import voters
from slimsam_jax.pruning.shrink import apply_masks, mask_tree
from slimsam_jax.pruning.shrink import shrink as shrink_pieces
from slimsam_jax.pruning.unfolding import fold_tree, groups_of_pieces, unfold_tree
from slimsam_jax.pruning.widths import check_keep, own_of


def score(
    params: Tree,
    grouping: Grouping,
    gradients: Tree | None = None,
    criterion: Criterion = "taylor",
    own: Collection[str] = (),
    seed: int = 0,
    only: Collection[str] | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = "none",
    votes: Sequence[str] | None = None,
) -> Scores:
    """Scores every channel of every group by the arrays that vote, see `importance.channel_scores`.

    Kernels vote (what a matrix product or a convolution reads); a group without any is scored by all its members.

    Args:
      params: the tree that was traced.
      gradients: a tree like it, as `gradients.disturbed_gradients` gives; for "obd" `gradients.hessian_diagonal`'s.
        Those in `importance.WITHOUT_GRADIENT` need none.
      criterion: a key of `importance.CRITERIA` or `OF_CHANNELS`, or "random".
      own: groups that have `copies` and are to be scored for each copy by itself.
      seed: for "random".
      only: names of the groups to score; all of them by default.
      reduction: of a group's arrays to one score, a key of `importance.REDUCTIONS`.
      normalizer: of each group's scores, so that groups can compete, a key of `importance.NORMALIZERS`.
      votes: patterns of the paths of the arrays that vote in place of the kernels, as "*/BatchNorm_*/scale". Groups
        that have none of them are not scored, and so not cut.

    Returns:
      {group: [size], or [copies, size] for those in `own`, float64}.

    Raises:
      InputError: there is no such group, or it has no copies, or the criterion needs gradients; a choice or a pattern
        that there is not.
    """
    if missing := sorted({*own, *(only or ())} - grouping.widths.keys()):
        raise InputError(f"there is no group {missing[0]!r} to score")
    for name in own:
        if not {group.name: group.copies for group in grouping.groups}.get(name):
            raise InputError(f"group {name!r} has no copies that could keep channels of their own")
    check_choice("criterion", criterion, CHOICES)
    check_choice("normalizer", normalizer, NORMALIZERS)
    if gradients is None and criterion not in WITHOUT_GRADIENT:
        raise InputError(
            f"criterion {criterion!r} needs gradients; without them there are {', '.join(WITHOUT_GRADIENT)}"
        )
    voting, scored = voters(grouping, votes)
    groups = groups_of_pieces(grouping.groups, grouping.axes, voting, own)
    groups = [group for group in groups if group.name in scored and (only is None or group.name in only)]
    weights = unfold_tree(params, grouping)
    slopes = weights if gradients is None else unfold_tree(gradients, grouping)
    scores = channel_scores(weights, slopes, groups, criterion, seed, reduction)
    return {name: NORMALIZERS[normalizer](of_group) for name, of_group in scores.items()}


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
        arrays, old = by_path(small), by_path(params)
        made = {path: arrays[path] for path in pieces if arrays[path] is not old[path]}
        grouping.traced.made.remember(arrays, made, keep)
    return small
