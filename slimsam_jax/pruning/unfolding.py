"""Trees taken apart so that each axis is one group, and put together again.

That is the form in which `importance`, `masks` and the cut know an axis: a fused qkv kernel
of [C, 3·H·D] becomes three arrays of [C, H, D]. Only arrays that have channels of a group
are touched.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.groups import Group, Member, Tree, by_path, path_of
from slimsam_jax.pruning.structure import Structure, Widths, fold, names, pieces_of, shape_of, unfold

if TYPE_CHECKING:
    from slimsam_jax.pruning.grouping import FoundGroup, Grouping

Axes = Mapping[str, Sequence[Structure]]


def is_cuttable(axes: Sequence[Structure]) -> bool:
    """Whether an array has channels of a group."""
    return any(names(axis) for axis in axes)


def unfold_tree(params: Tree, grouping: Grouping) -> dict[str, list[Any]]:
    """{path: pieces} of the arrays that have channels of a group. `fold_tree` is the inverse.

    Raises:
      InputError: the tree is not of the paths and shapes that were traced.
    """
    arrays = by_path(params)
    check_shapes(arrays, grouping, grouping.widths)
    cuttable = {path: axes for path, axes in grouping.axes.items() if is_cuttable(axes)}
    return {path: unfold(arrays[path], axes, grouping.widths) for path, axes in cuttable.items()}


def fold_tree(unfolded: Mapping[str, Sequence[Any]], params: Tree, grouping: Grouping) -> Tree:
    """Puts pieces, shrunk or not, into the places of the arrays of `params` that they come from."""

    def whole(keys, array):
        path = path_of(keys)
        return fold(unfolded[path], grouping.axes[path]) if path in unfolded else array

    return jax.tree_util.tree_map_with_path(whole, params)


def groups_of_pieces(
    groups: Sequence[FoundGroup], axes: Axes, kernels: Collection[str], own: Collection[str] = ()
) -> list[Group]:
    """The groups on an unfolded tree.

    Args:
      groups: as found.
      axes: {path: structures} of the arrays that were unfolded.
      kernels: paths of arrays that vote; where a group has none of them, all its members do.
      own: names of the groups whose copies keep channels of their own.
    """
    sizes, numbered = {group.name: group.size for group in groups}, {group.name: group.copies for group in groups}
    members: dict[str, list[Member]] = {group.name: [] for group in groups}
    for path, array in axes.items():
        for k, piece in enumerate(pieces_of(array)):
            for i, name in enumerate(piece):
                if isinstance(name, str):
                    copies = piece.index(numbered[name]) if name in own else None
                    members[name].append(Member(f"{path}/{k}", i, path in kernels, copies, path))
    return [
        Group(name, sizes[name], _with_votes(places), sizes[numbered[name]] if name in own else 0)
        for name, places in members.items()
        if places
    ]


def _with_votes(members: list[Member]) -> tuple[Member, ...]:
    if any(member.votes for member in members):
        return tuple(members)
    return tuple(member._replace(votes=True) for member in members)


def check_paths(arrays: Mapping[str, Any], grouping: Grouping) -> None:
    """Raises InputError if arrays are not those of the grouping, by path and rank."""
    for path in (*grouping.axes, *grouping.unused):
        if path not in arrays:
            nearest = difflib.get_close_matches(path, arrays, n=3, cutoff=0)
            raise InputError(f"there is no array {path!r}, which was traced; the nearest are {', '.join(nearest)}")
    for path, array in arrays.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise InputError(f"{path!r} is a {type(array).__name__}, not an array")
        if path not in grouping.axes and path not in grouping.unused:
            raise InputError(f"array {path!r} was not there when the function was traced")
        if path in grouping.axes and array.ndim != len(grouping.axes[path]):
            raise InputError(f"array {path!r} has {array.ndim} axes; it was traced with {len(grouping.axes[path])}")


def check_shapes(arrays: Mapping[str, Any], grouping: Grouping, widths: Widths) -> None:
    """Raises InputError if arrays do not have the shapes of the grouping at these widths of its groups."""
    check_paths(arrays, grouping)
    for path, axes in grouping.axes.items():
        if tuple(arrays[path].shape) != (shape := shape_of(axes, widths)):
            raise InputError(f"array {path!r} has shape {tuple(arrays[path].shape)}, not {shape}")


def has_shapes(arrays: Mapping[str, Any], grouping: Grouping, widths: Widths) -> bool:
    return all(tuple(arrays[path].shape) == shape_of(axes, widths) for path, axes in grouping.axes.items())
