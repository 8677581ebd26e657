"""A group: the axes of a parameter tree that shrink together, because they are the same channels.

Nothing in this folder knows a model, or a framework above JAX. A tree is any JAX pytree of arrays;
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
Scores = dict[str, np.ndarray]  # group name -> importance per channel, of the group's shape
Keep = Mapping[str, np.ndarray]  # group name -> ascending indices of the channels that stay: [width] or [copies, width]


class Member(NamedTuple):
    """One axis of one array.

    Attributes:
      path: the array's.
      axis: where its channels lie.
      votes: whether it is counted in the importance of the channel.
      copies: in a group of copies, the axis that numbers them (the heads of an attention, say).
      whole: of a piece, the path of the array that it is of; "" of a whole array.
    """

    path: str
    axis: int
    votes: bool = False
    copies: int | None = None
    whole: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels 0..size-1, each a slice through every member.

    Attributes:
      name: unique, e.g. "embedding" or "blocks_3/attn".
      size: number of channels, equal to the length of every member's axis.
      members: where the channels live.
      copies: 0, or the number of copies that keep equally many channels, but each its own.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    copies: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its scores: [size] or [copies, size]."""
        return (self.copies, self.size) if self.copies else (self.size,)


def by_path(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths."""
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
            for axis, size, what in ((member.axis, group.size, "channels"), (member.copies, group.copies, "copies")):
                if axis is not None and (not 0 <= axis < len(shape) or shape[axis] != size):
                    raise ValueError(
                        f"group {group.name}: axis {axis} of {member.path} {shape} should have {size} {what}"
                    )
            if (member.copies is None) != (not group.copies):
                raise ValueError(f"group {group.name}: {member.path} must name the axis of its copies, if it has any")
