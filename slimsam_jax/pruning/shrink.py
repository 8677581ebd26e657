"""Cuts channels: by a tree of masks, or by taking them out of the arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.pruning.groups import Group, Keep, Member, Tree, path_of


def mask_tree(params: Tree, groups: Sequence[Group], keep: Keep) -> Tree:
    """Makes a tree like `params` of 0/1 arrays, each of the rank of its parameter and broadcastable to it."""
    cuts = _cuts(groups, keep)

    def mask(keys, leaf):
        result = jnp.ones((1,) * leaf.ndim, leaf.dtype)
        for member, kept in cuts.get(path_of(keys), ()):
            size = leaf.shape[member.axis]
            channels = (np.arange(size) == kept[..., None]).any(-2).astype(leaf.dtype)
            result = result * _along(member, channels, leaf.ndim)
        return result

    return jax.tree_util.tree_map_with_path(mask, params)


def apply_masks(params: Tree, masks: Tree) -> Tree:
    """Zeroes what the masks remove; shapes stay."""
    return jax.tree.map(jnp.multiply, params, masks)


def shrink(params: Tree, groups: Sequence[Group], keep: Keep) -> Tree:
    """Cuts the removed channels out of every member, numpy or JAX arrays; order is kept.

    Equal to masking wherever a zero channel has no effect. In a transformer that is
    everywhere but in the LayerNorms over a masked embedding: their mean and variance
    count the zeros too.
    """
    cuts = _cuts(groups, keep)

    def cut(keys, leaf):
        for member, kept in cuts.get(path_of(keys), ()):
            if member.copies is None:
                leaf = leaf.take(kept, axis=member.axis)
            else:
                leaf = np.take_along_axis(leaf, _along(member, kept, leaf.ndim), axis=member.axis)
        return leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def _cuts(groups: Sequence[Group], keep: Keep) -> dict[str, list[tuple[Member, np.ndarray]]]:
    """Lists the cuts of each array, {path: [(member, kept indices)]}; those in copies first, while all are there."""
    cuts: dict[str, list[tuple[Member, np.ndarray]]] = {}
    for group in groups:
        for member in group.members if group.name in keep else ():
            cuts.setdefault(member.path, []).append((member, np.asarray(keep[group.name])))
    return {path: sorted(listed, key=lambda cut: cut[0].copies is None) for path, listed in cuts.items()}


def _along(member: Member, channels: np.ndarray, ndim: int) -> np.ndarray:
    """Reshapes [channels] or [copies, channels] to lie along the member's axes of an array of rank `ndim`."""
    axes = [member.axis] if member.copies is None else [member.copies, member.axis]
    if axes != sorted(axes):
        channels = channels.T
    shape = [1] * ndim
    for axis, length in zip(sorted(axes), channels.shape, strict=True):
        shape[axis] = length
    return channels.reshape(shape)
