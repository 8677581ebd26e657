"""Gives groups names of one's own; groups that get the same name become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.grouping import FoundGroup, Grouping, places
from slimsam_jax.pruning.structure import renamed


def rename(grouping: Grouping, names: Mapping[str, str]) -> Grouping:
    """Renames groups, and ties those that get the same name: their channels stay or go together from then on.

    Torch-Pruning, for one, ties q, k and v, which a fused qkv layer holds; the function itself may let v go apart.

    Args:
      names: {group: new name}; a group that is not named keeps its own.

    Returns:
      the grouping without the function, which knows the old names alone: `run` refuses.

    Raises:
      InputError: there is no such group, or groups of different sizes would be tied.
    """
    for name in names:
        if name not in grouping.widths:
            raise InputError(f"there is no group {name!r} to rename")
    new = {group.name: names.get(group.name, group.name) for group in grouping.groups}
    axes = {path: tuple(renamed(axis, new) for axis in own) for path, own in grouping.axes.items()}
    tied: dict[str, list[FoundGroup]] = {}
    for group in grouping.groups:
        copies = group.copies and new[group.copies]
        tied.setdefault(new[group.name], []).append(dataclasses.replace(group, name=new[group.name], copies=copies))
    members = places(axes)
    groups = tuple(dataclasses.replace(_tie(each), members=members[name]) for name, each in tied.items())
    return dataclasses.replace(grouping, groups=groups, axes=axes, traced=None)


def _tie(groups: Sequence[FoundGroup]) -> FoundGroup:
    """One group of all; copies may keep channels of their own only if they may in each."""
    first, *others = groups
    if wrong := [group for group in others if group.size != first.size]:
        raise InputError(f"groups of {first.size} and {wrong[0].size} channels cannot both be {first.name!r}")
    crossed = tuple(dict.fromkeys(name for group in groups for name in group.crossed))
    same = all(group.copies == first.copies for group in others)
    return dataclasses.replace(first, crossed=crossed, copies=first.copies if same else None)
