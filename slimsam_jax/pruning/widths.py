"""What stays of each group: checked if it is given, else read off the shapes of cut arrays."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.groups import Keep
from slimsam_jax.pruning.structure import Structure, Widths, length, names

if TYPE_CHECKING:
    from slimsam_jax.pruning.grouping import FoundGroup, Grouping


def check_keep(grouping: Grouping, keep: Keep) -> dict[str, np.ndarray]:
    """The indices as arrays.

    Raises:
      InputError: an unknown group, no channel left, or not ascending indices of its channels, [width] or, of a
        group with copies, [copies, width].
    """
    groups = {group.name: group for group in grouping.groups}
    if not isinstance(keep, Mapping):
        raise InputError(f"keep must be {{group: indices of channels}}, not of type {type(keep).__name__}")
    for name in keep:
        if name not in groups:
            nearest = difflib.get_close_matches(str(name), groups, n=3, cutoff=0)
            raise InputError(f"there is no group {name!r}; the nearest are {', '.join(nearest)}")
    return {name: _check(groups, groups[name], kept) for name, kept in keep.items()}


def _check(groups: Mapping[str, FoundGroup], group: FoundGroup, kept: Any) -> np.ndarray:
    try:
        kept = np.asarray(kept)
    except ValueError:  # rows of different lengths
        raise InputError(f"keep[{group.name!r}]: every copy must keep equally many channels") from None
    if kept.size == 0:
        raise InputError(f"group {group.name!r} would keep none of its {group.size} channels; keep at least one")
    rows = groups[group.copies].size if group.copies else None
    fits = kept.ndim == 1 or (kept.ndim == 2 and kept.shape[0] == rows)
    if not fits or kept.dtype.kind not in "iu":
        of_copies = f" or [{rows}, width]" if rows else ""
        raise InputError(
            f"keep[{group.name!r}] must be indices of channels, [width]{of_copies}; it is {kept.dtype}{kept.shape}"
        )
    if kept.min() < 0 or kept.max() >= group.size or (np.diff(kept.astype(np.int64)) <= 0).any():
        raise InputError(f"keep[{group.name!r}] must be ascending and between 0 and {group.size - 1}")
    return kept


def widths_of(grouping: Grouping, keep: Keep) -> dict[str, int]:
    """{group: channels that stay}; a group that is not in `keep` stays whole."""
    return grouping.widths | {name: kept.shape[-1] for name, kept in keep.items()}


def own_of(keep: Keep) -> list[str]:
    """The groups of which each copy keeps channels of its own."""
    return [name for name, kept in keep.items() if kept.ndim == 2]


def solve_widths(grouping: Grouping, arrays: Mapping[str, Any]) -> dict[str, int]:
    """Reads the widths off the shapes of cut arrays.

    Raises:
      InputError: the shapes are not those of cut arrays, or leave a width open.
    """
    known: dict[str, int] = {}
    pending = [
        (path, axis, size)
        for path, axes in grouping.axes.items()
        for axis, size in zip(axes, arrays[path].shape, strict=True)
    ]
    while True:
        found = {}
        for path, axis, size in pending:
            unknown = sorted(set(names(axis)) - known.keys())
            if len(unknown) == 1:
                found[unknown[0]] = _solve(axis, size, unknown[0], known, path)
        if not found:
            break
        known |= found
    _check_solved(grouping, known)
    return known


def _solve(axis: Structure, size: int, name: str, known: Widths, path: str) -> int:
    """The width of the one group whose width is open in an axis of this length, which grows with it."""
    widths = range(1, size + 1)
    of = lambda width: length(axis, {**known, name: width})
    width = 1 + bisect.bisect_left(widths, size, key=of)
    if width not in widths or of(width) != size:
        raise InputError(f"{path}: an axis of length {size} is none that a cut of group {name!r} leaves")
    return width


def _check_solved(grouping: Grouping, known: Widths) -> None:
    open_: Sequence[FoundGroup] = [group for group in grouping.groups if group.name not in known]
    if open_:
        raise InputError(
            f"the shapes do not tell how many channels of group {open_[0].name!r} stay "
            f"({open_[0].members[0].path}): pass keep="
        )
    for group in grouping.groups:
        if known[group.name] > group.size:
            raise InputError(f"{group.members[0].path} is wider than group {group.name!r}, which has {group.size}")
