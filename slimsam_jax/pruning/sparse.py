"""Sparse training: optax transformations that shrink whole channels while a model is trained.

Each adds to the updates the gradient of a penalty on channels, so it stands before the optimizer:

optimizer = optax.chain(group_lasso(grouping, 1e-4), optax.adam(1e-3))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import Group, Keep, Tree, path_of
from slimsam_jax.pruning.patterns import voters
from slimsam_jax.pruning.structure import fold
from slimsam_jax.pruning.unfolding import groups_of_pieces, unfold_tree
from slimsam_jax.pruning.widths import check_keep

PerChannel = dict[str, jax.Array]  # group -> [size]


def group_lasso(
    grouping: Grouping,
    strength: float,
    only: Sequence[str] | None = None,
    votes: Sequence[str] | None = None,
) -> optax.GradientTransformation:
    """Pulls every channel to zero with the same force, so that the small ones get there.

    The penalty is strength * sum over channels of the L2 norm of all their weights (Yuan & Lin
    2006; on coupled layers as in DepGraph, Fang et al., CVPR 2023), its gradient strength * w / norm.
    Of the scales of BatchNorms alone it is network slimming's (Liu et al., ICCV 2017).

    Args:
      grouping: of the parameters that are trained, at full width. Its kernels are penalised, and the members of groups
        without any; weights that lie in two groups, twice.
      strength: of the penalty, not negative.
      only: names of the groups; all of them by default.
      votes: patterns of the paths of the arrays that are penalised in place of the kernels, as "*/BatchNorm_*/scale".

    Raises:
      InputError: a negative strength, an unknown group, or a pattern that matches nothing.
    """
    groups = _groups(grouping, only, votes)
    if not strength >= 0:
        raise InputError(f"strength {strength} of a penalty is negative")

    def factors(norms: PerChannel) -> PerChannel:
        # A channel that is zero stays so: 0 is among the slopes of a norm there.
        return {name: strength / jnp.where(norm > 0, norm, jnp.inf) for name, norm in norms.items()}

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None) -> tuple[Tree, optax.EmptyState]:
        pieces = _pieces(params, grouping)
        return _penalised(updates, pieces, factors(_norms(pieces, groups)), groups, grouping), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Growing(NamedTuple):
    """The state of the growing penalty.

    Attributes:
      step: updates so far.
      strengths: of each channel, [size] per group.
    """

    step: jax.Array
    strengths: PerChannel


def growing_regularization(
    grouping: Grouping,
    grow: float,
    every: int = 1,
    most: float = 1.0,
    keep: Keep | None = None,
    only: Sequence[str] | None = None,
) -> optax.GradientTransformation:
    """Adds a weight decay that grows on the channels that are to go (GReg: Wang et al., ICLR 2021).

    The penalty of a channel is strength / 2 * the squares of its weights. Every `every` updates
    the strength grows by `grow`, up to `most`: of the channels that `keep` leaves out (GReg-1), or
    without it of each by how small its norm is, from nothing for the largest of its group to
    `grow` for the smallest (as Torch-Pruning's GrowingRegPruner, by squared norms).

    Args:
      grouping, only: as in `group_lasso`.
      grow, most: not negative.
      every: updates, at least one.
      keep: {group: indices that stay}; a group that is not named is not penalised.

    Raises:
      InputError: numbers out of range, or groups or indices that there are not.
    """
    if not (grow >= 0 and most >= 0 and every >= 1):
        raise InputError(f"grow {grow} and most {most} must not be negative, and every {every} at least 1")
    groups = _groups(grouping, list(keep) if only is None and keep is not None else only)
    chosen = None if keep is None else _left_out(groups, check_keep(grouping, keep))

    def init(params: Tree) -> Growing:
        return Growing(jnp.zeros((), jnp.int32), {group.name: jnp.zeros(group.size) for group in groups})

    def update(updates: Tree, state: Growing, params: Tree | None = None) -> tuple[Tree, Growing]:
        pieces = _pieces(params, grouping)
        rates = _smallness(_norms(pieces, groups)) if chosen is None else chosen
        step = state.step + 1
        grown = jnp.where(step % every == 0, grow, 0.0)
        add = lambda name, strength: jnp.minimum(strength + grown * rates[name], most)
        strengths = {name: add(name, strength) for name, strength in state.strengths.items()}
        return _penalised(updates, pieces, strengths, groups, grouping), Growing(step, strengths)

    return optax.GradientTransformation(init, update)


def _groups(grouping: Grouping, only: Sequence[str] | None, votes: Sequence[str] | None = None) -> list[Group]:
    voting, spoken_for = voters(grouping, votes)
    if missing := sorted(set(only or ()) - grouping.widths.keys()):
        raise InputError(f"there is no group {missing[0]!r} to penalise")
    groups = groups_of_pieces(grouping.groups, grouping.axes, voting)
    return [group for group in groups if group.name in spoken_for and (only is None or group.name in only)]


def _pieces(params: Tree | None, grouping: Grouping) -> dict[str, list[jax.Array]]:
    if params is None:
        raise InputError("a penalty on weights needs them: call update(updates, state, params)")
    return unfold_tree(params, grouping)


def _left_out(groups: Sequence[Group], keep: Mapping[str, np.ndarray]) -> PerChannel:
    """1 for what goes, 0 for what stays."""
    for group in groups:
        if keep.get(group.name, np.zeros(0)).ndim == 2:
            raise InputError(f"group {group.name!r} keeps other channels in each copy: a penalty is on those of all")
    stays = {group.name: keep.get(group.name, np.arange(group.size)) for group in groups}
    return {group.name: jnp.ones(group.size).at[stays[group.name]].set(0) for group in groups}


def _smallness(norms: PerChannel) -> PerChannel:
    """From 0, the largest, to 1, the smallest."""
    squares = {name: jnp.square(norm) for name, norm in norms.items()}
    return {name: (s.max() - s) / (s.max() - s.min() + 1e-8) for name, s in squares.items()}


def _norms(pieces: Mapping[str, Sequence[jax.Array]], groups: Sequence[Group]) -> PerChannel:
    """The L2 norm of all penalised weights of each channel."""

    def of_member(piece: jax.Array, axis: int) -> jax.Array:
        return jnp.square(piece).sum(tuple(i for i in range(piece.ndim) if i != axis))

    return {
        group.name: jnp.sqrt(sum(of_member(_piece(pieces, m.path), m.axis) for m in group.members if m.votes))
        for group in groups
    }


def _piece(pieces: Mapping[str, Sequence[jax.Array]], path: str) -> jax.Array:
    array, _, number = path.rpartition("/")
    return pieces[array][int(number)]


def _penalised(
    updates: Tree,
    pieces: Mapping[str, Sequence[jax.Array]],
    factors: PerChannel,
    groups: Sequence[Group],
    grouping: Grouping,
) -> Tree:
    """The updates, and to each penalised weight itself times the factors of its channels."""
    sums: dict[str, jax.Array | float] = {}
    for group in groups:
        for member in group.members if group.name in factors else ():
            if member.votes:
                shape = [1] * _piece(pieces, member.path).ndim
                shape[member.axis] = group.size
                sums[member.path] = sums.get(member.path, 0.0) + factors[group.name].reshape(shape)

    def whole(keys: tuple, update: jax.Array) -> jax.Array:
        path = path_of(keys)
        names = [f"{path}/{k}" for k in range(len(pieces.get(path, ())))]
        if not sums.keys() & set(names):
            return update
        slopes = [piece * sums.get(name, 0.0) for name, piece in zip(names, pieces[path], strict=True)]
        return update + fold(slopes, grouping.axes[path]).astype(update.dtype)

    return jax.tree_util.tree_map_with_path(whole, updates)
