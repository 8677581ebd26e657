"""Scores -> how many and which channels stay, as indices and as a tree of masks; and the cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.pruning.group import Group, Keep, Member, Scores, Tree, path_of

Worth = Mapping[str, np.ndarray]  # group name -> [size] what each further channel adds, falling


def rounded_width(size: int, ratio: float, multiple: int = 1) -> int:
    """Channels that stay of `size`: the nearest multiple to size * (1 - ratio), at least one.

    A size below one multiple stays as it is.

    Raises:
      ValueError: ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is not the share of channels to remove, 0 <= ratio < 1")
    wanted = size * (1 - ratio)
    if size < multiple:
        return size
    return multiple * min(size // multiple, max(1, int(wanted / multiple + 0.5)))


def worth_of(scores: Scores) -> dict[str, np.ndarray]:
    """What each further channel of a group adds, the best first: {group: [size], falling}."""
    fall = {name: -np.sort(-np.atleast_2d(score), axis=1) for name, score in scores.items()}
    return {name: by_copy.sum(axis=0) for name, by_copy in fall.items()}


def local_widths(worth: Worth, ratio: float, multiple: int = 1) -> dict[str, int]:
    """The same share of every group, to the nearest multiple."""
    return {name: rounded_width(len(gains), ratio, multiple) for name, gains in worth.items()}


def global_widths(worth: Worth, ratio: float, multiple: int = 1, least: float = 0.0) -> dict[str, int]:
    """Widths by worth, wherever it lies; together exactly the share of all channels that stays, if `least` allows.

    Channels compete in chunks of `multiple`, best first within their group, so rounding
    costs the least important ones. What a group has beyond its last whole chunk goes.

    Args:
      worth: {group: [size], falling}, comparable between groups.
      ratio: share of the pooled channels to remove.
      multiple: every width that stays is a multiple of this (a narrower group keeps its width).
      least: share of its channels that every group keeps at any rate, and one multiple at least.
    """
    chunks = []  # (mean worth, group, width), the guaranteed ones with infinite worth
    for name, gains in worth.items():
        chunk = min(multiple, len(gains))
        guaranteed = max(1, int(least * len(gains) / chunk))
        for i in range(len(gains) // chunk):
            mean = np.inf if i < guaranteed else gains[i * chunk : (i + 1) * chunk].mean()
            chunks.append((mean, name, chunk))
    chunks.sort(key=lambda chunk: -chunk[0])
    left = rounded_width(sum(map(len, worth.values())), ratio, multiple)
    widths = dict.fromkeys(worth, 0)
    for mean, name, chunk in chunks:
        if mean == np.inf or left >= chunk:
            widths[name] += chunk
            left -= chunk
    return widths


def keep_widths(scores: Scores, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Keeps the `widths[group]` highest scores of each group (of each of its copies); of equal ones the first."""
    best_first = {name: np.argsort(-score, axis=-1, kind="stable") for name, score in scores.items()}
    return {name: np.sort(order[..., : widths[name]], axis=-1) for name, order in best_first.items()}


def keep_local(scores: Scores, ratio: float, multiple: int = 1) -> dict[str, np.ndarray]:
    """Removes the same share of every group: exactly that many, the lowest scores (see `local_widths`)."""
    return keep_widths(scores, local_widths(worth_of(scores), ratio, multiple))


def keep_global(scores: Scores, ratio: float, multiple: int = 1, least: float = 0.0) -> dict[str, np.ndarray]:
    """Removes a share of the channels of all groups together, the lowest scores (see `global_widths`)."""
    return keep_widths(scores, global_widths(worth_of(scores), ratio, multiple, least))


def mask_tree(params: Tree, groups: Sequence[Group], keep: Keep) -> Tree:
    """A tree like `params` of 0/1 arrays, each of the rank of its parameter and broadcastable to it."""
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
    """{path: [(member, kept indices)]} of the groups in `keep`; cuts within copies first, as long as all are there."""
    cuts: dict[str, list[tuple[Member, np.ndarray]]] = {}
    for group in groups:
        for member in group.members if group.name in keep else ():
            cuts.setdefault(member.path, []).append((member, np.asarray(keep[group.name])))
    return {path: sorted(found, key=lambda cut: cut[0].copies is None) for path, found in cuts.items()}


def _along(member: Member, channels: np.ndarray, ndim: int) -> np.ndarray:
    """[channels] or [copies, channels] -> the same along the member's axes of an array of rank `ndim`."""
    axes = [member.axis] if member.copies is None else [member.copies, member.axis]
    if axes != sorted(axes):
        channels = channels.T
    shape = [1] * ndim
    for axis, length in zip(sorted(axes), channels.shape, strict=True):
        shape[axis] = length
    return channels.reshape(shape)
