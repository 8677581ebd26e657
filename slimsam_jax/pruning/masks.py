"""Scores -> which channels stay, as indices and as a tree of masks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.pruning.group import Group, Keep, Scores, Tree, path_of


def rounded_width(size: int, ratio: float, multiple: int = 1) -> int:
    """Channels that stay of `size`: the nearest multiple to size * (1 - ratio), at least one multiple.

    Raises:
      ValueError: ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is not the share of channels to remove, 0 <= ratio < 1")
    wanted = size * (1 - ratio)
    return min(size, max(multiple, multiple * int(wanted / multiple + 0.5)))


def keep_local(scores: Scores, ratio: float, multiple: int = 1) -> dict[str, np.ndarray]:
    """Removes the same share of every group: the lowest scores go.

    Exactly the asked number goes; of equal scores the higher index does.

    Args:
      scores: {group: [size]}.
      ratio: share of channels to remove.
      multiple: the width that stays is the nearest multiple of this.
    """
    return keep_widths(scores, {name: rounded_width(len(score), ratio, multiple) for name, score in scores.items()})


def keep_widths(scores: Scores, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """Keeps the `widths[group]` highest scores of each group."""
    return {name: _top(score, widths[name]) for name, score in scores.items()}


def keep_global(scores: Scores, ratio: float, multiple: int = 1, least: float = 0.0) -> dict[str, np.ndarray]:
    """Removes a share of the channels of all groups together: the lowest scores go, wherever they are.

    Channels compete in chunks of `multiple`, best first within their group, so rounding
    costs the least important channels and the total is exact.

    Args:
      scores: {group: [size]}, normalised to be comparable.
      ratio: share of the pooled channels to remove.
      multiple: every width that stays is a multiple of this.
      least: share of its channels that every group keeps at any rate, and one multiple at least.
    """
    floors = {name: max(1, int(least * len(score) / multiple)) for name, score in scores.items()}
    chunks = []  # (score, group, order), the guaranteed ones with infinite score
    for name, score in scores.items():
        best_first = np.sort(score)[::-1]
        for i in range(len(score) // multiple):
            mean = np.inf if i < floors[name] else best_first[i * multiple : (i + 1) * multiple].mean()
            chunks.append((mean, name))
    total = rounded_width(sum(len(score) for score in scores.values()), ratio, multiple) // multiple
    chosen = sorted(chunks, key=lambda chunk: -chunk[0])[: max(total, sum(floors.values()))]
    widths = {name: multiple * sum(owner == name for _, owner in chosen) for name in scores}
    return keep_widths(scores, widths)


def _top(score: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the `count` highest scores; among equals the lower index wins."""
    return np.sort(np.argsort(-score, kind="stable")[:count])


def mask_tree(params: Tree, groups: Sequence[Group], keep: Keep) -> Tree:
    """A tree like `params` of 0/1 arrays, each of the rank of its parameter and broadcastable to it."""
    axes = _axes(groups, keep)

    def mask(keys, leaf):
        result = jnp.ones((1,) * leaf.ndim, leaf.dtype)
        for axis, kept in axes.get(path_of(keys), ()):
            channels = jnp.zeros(leaf.shape[axis], leaf.dtype).at[kept].set(1)
            result = result * channels.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])
        return result

    return jax.tree_util.tree_map_with_path(mask, params)


def apply_masks(params: Tree, masks: Tree) -> Tree:
    """Zeroes what the masks remove; shapes stay."""
    return jax.tree.map(jnp.multiply, params, masks)


def shrink(params: Tree, groups: Sequence[Group], keep: Keep) -> Tree:
    """Cuts the removed channels out of every member; order is kept.

    Equal to masking wherever a zero channel has no effect. In a transformer that is
    everywhere but in the LayerNorms over a masked embedding: their mean and variance
    count the zeros too.
    """
    axes = _axes(groups, keep)

    def cut(keys, leaf):
        for axis, kept in axes.get(path_of(keys), ()):
            leaf = jnp.take(leaf, kept, axis=axis)
        return leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def _axes(groups: Sequence[Group], keep: Keep) -> dict[str, list[tuple[int, np.ndarray]]]:
    """{path: [(axis, kept indices)]} of the groups named in `keep`."""
    axes: dict[str, list[tuple[int, np.ndarray]]] = {}
    for group in groups:
        for member in group.members if group.name in keep else ():
            axes.setdefault(member.path, []).append((member.axis, keep[group.name]))
    return axes
