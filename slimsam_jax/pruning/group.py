"""A group: the axes of a parameter tree that shrink together, because they are the same channels.

Nothing in this folder knows a framework or a model. A tree is any JAX pytree of arrays;
a path is its keys joined by "/", e.g. "blocks_3/attn/q/kernel".
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Tree = Any
Scores = dict[str, np.ndarray]  # group name -> [size] importance per channel
Keep = Mapping[str, np.ndarray]  # group name -> sorted indices of the channels that stay


class Member(NamedTuple):
    """One axis of one array. Those with `votes` are counted in the importance of the channel."""

    path: str
    axis: int
    votes: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels 0..size-1, each a slice through every member.

    Attributes:
      name: unique, e.g. "embedding" or "blocks_3/attn".
      size: number of channels, equal to the length of every member's axis.
      members: where the channels live.
    """

    name: str
    size: int
    members: tuple[Member, ...]


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(keys): leaf for keys, leaf in leaves}


def path_of(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def check_groups(tree: Tree, groups: Sequence[Group]) -> None:
    """Raises ValueError if a member is not in the tree (naming the nearest path) or has another size."""
    leaves = by_path(tree)
    for group in groups:
        for member in group.members:
            if member.path not in leaves:
                nearest = difflib.get_close_matches(member.path, leaves, n=3, cutoff=0)
                raise ValueError(f"group {group.name}: no array {member.path!r}; the nearest are {', '.join(nearest)}")
            shape = leaves[member.path].shape
            if not 0 <= member.axis < len(shape) or shape[member.axis] != group.size:
                raise ValueError(
                    f"group {group.name}: axis {member.axis} of {member.path} {shape} should have {group.size} channels"
                )
