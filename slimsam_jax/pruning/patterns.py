"""Patterns that name arrays, their axes, and the groups that lie in them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from slimsam_jax.errors import InputError

if TYPE_CHECKING:
    from slimsam_jax.pruning.grouping import Grouping


def fits(place: str, pattern: str) -> bool:
    """Whether a pattern means a place, an array's path or "path:axis".

    An array "head/kernel", all below "head", one axis "head/kernel:1", or wildcards as in "*/norm1/*".
    """
    return any(fnmatch.fnmatchcase(place, form) for form in (pattern, f"{pattern}:*", f"{pattern}/*"))


def matching(what: str, pattern: str, places: Collection[str]) -> set[str]:
    """The places that a pattern means.

    Raises:
      InputError: none, and `what` holds the pattern.
    """
    found = {place for place in places if fits(place, pattern)}
    if not found:
        nearest = ", ".join(difflib.get_close_matches(pattern, list(places), n=3, cutoff=0))
        raise InputError(f"{what}{pattern!r} matches nothing; the nearest are {nearest}")
    return found


def groups_matching(what: str, pattern: str, names: Iterable[str], grouping: Grouping | None) -> set[str]:
    """Those of the named groups that a pattern means: by their names, and by any of their members in a grouping."""
    places = {name: {name} for name in names}
    for group in grouping.groups if grouping is not None else ():
        if group.name in places:
            places[group.name] |= {f"{member.path}:{member.axis}" for member in group.members}
    found = matching(what, pattern, list(dict.fromkeys(place for own in places.values() for place in own)))
    return {name for name, own in places.items() if own & found}


def voters(grouping: Grouping, votes: str | Sequence[str] | None) -> tuple[Collection[str], Collection[str]]:
    """Paths of the arrays that speak for their groups, and the names of the groups that they speak for.

    Args:
      votes: patterns of paths; None for the kernels, and for all members of a group that has none.
    """
    if votes is None:
        return grouping.kernels, grouping.widths
    patterns = (votes,) if isinstance(votes, str) else votes
    paths = set().union(*(matching("votes=", pattern, grouping.axes) for pattern in patterns))
    return paths, {group.name for group in grouping.groups if any(member.path in paths for member in group.members)}
