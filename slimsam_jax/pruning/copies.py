"""Which groups may keep channels of their own per copy, as the heads of an attention may.

Group D may, numbered by group H, if every value that has D has H beside it: then no value
mixes the D of one h with that of another, and each h can lose other channels, equally many.
In q·k of SAM both read one table of relative positions, [2s - 1, D] without heads, so there
the heads share their channels; v and proj have the heads everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from slimsam_jax.pruning.structure import Product, Structure, names

Row = tuple[Structure, ...]  # the axes of one value


def copies(groups: Sequence[str], crossed: Mapping[str, Iterable[str]], rows: Iterable[Row]) -> dict[str, str]:
    """{group: the group that numbers its copies}.

    Args:
      groups: names; a group that numbers copies has none itself.
      crossed: the reductions over each. One that is cumulative mixes the copies.
      rows: the axes of everything that the function computes.
    """
    mixed = {name for name in groups if any(what.startswith("cum") for what in crossed[name])}
    beside: dict[str, frozenset[str]] = {}
    for row in set(rows):
        counts = Counter(name for axis in row for name in names(axis))
        for name, context in _contexts(row):
            own = frozenset(other for other in context if other != name)
            beside[name] = beside[name] & own if name in beside else own
        # Twice in one value, as in attention between heads: there one copy meets another.
        mixed |= {name for axis in row for name in _factors(axis) if counts[name] > 1}
    found: dict[str, str] = {}
    for name in groups:
        numbering = [other for other in groups if other in beside[name] and other not in mixed and other not in found]
        if numbering and name not in found.values():
            found[name] = numbering[0]
    return found


def _factors(axis: Structure) -> tuple[str, ...]:
    """The groups that every index of the axis has."""
    parts = axis.parts if isinstance(axis, Product) else (axis,)
    return tuple(part for part in parts if isinstance(part, str))


def _contexts(row: Row) -> Iterator[tuple[str, list[str]]]:
    """For each occurrence of each group in a value, the groups beside it."""
    for i, axis in enumerate(row):
        others = [name for k, other in enumerate(row) if k != i for name in _factors(other)]
        for name, within in _occurrences(axis):
            yield name, others + within


def _occurrences(structure: Structure) -> Iterator[tuple[str, list[str]]]:
    if isinstance(structure, str):
        yield structure, []
    elif not isinstance(structure, int):
        for i, part in enumerate(structure.parts):
            siblings = structure.parts[:i] + structure.parts[i + 1 :] if isinstance(structure, Product) else ()
            own = [name for name in siblings if isinstance(name, str)]
            for name, within in _occurrences(part):
                yield name, own + within
