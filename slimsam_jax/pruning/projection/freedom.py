"""Tells which groups' basis may be changed before the cut, and how far, from the traced function."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.counts import counts
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import by_path
from slimsam_jax.pruning.projection.layout import Layout
from slimsam_jax.pruning.projection.states import Broken, Tracker
from slimsam_jax.pruning.projection.walk import walk


@dataclasses.dataclass(frozen=True)
class Freedom:
    """How far a group's basis may be changed, and why no further.

    Attributes:
      kind: "linear", any invertible change of basis leaves the function the same (v and what projects it, q and k);
        "orthogonal", any rotation does, as of a residual stream between linear maps and norms; or "none".
      why: for "none" what forbids it, and where; for "orthogonal" what a rotation must keep.
      known: the group's parameters and readers, for `project`; None if the kind is "none".
    """

    kind: Literal["linear", "orthogonal", "none"]
    why: str = ""
    known: Tracker | None = dataclasses.field(default=None, compare=False, repr=False)


def freedom(grouping: Grouping) -> dict[str, Freedom]:
    """Derives from the jaxpr which changes of basis leave the function the same.

    Linear maps, additions and norms over the group's axis commute with a rotation (LayerNorm with those that keep the
    all-ones direction), linear maps alone with any invertible change. Everything else, and every primitive without a
    rule, forbids it. A norm's scale and bias must be read by linear maps alone, which take them over.

    Returns:
      {group: its freedom} of all groups.

    Raises:
      InputError: the grouping has lost its function.
    """
    if (traced := grouping.traced) is None:
        raise InputError(
            "this grouping was read from JSON or renamed, without the function that tells a basis' freedom"
        )
    layout, literals = layout_of(grouping), counts(traced.values, traced.program, traced.operands, grouping.widths)
    return {
        group.name: _freedom(Tracker(group.name, traced, layout, literals, grouping.axes), layout)
        for group in grouping.groups
    }


def layout_of(grouping: Grouping) -> Layout:
    """Of the traced function."""
    traced = grouping.traced
    values = by_path(jax.tree.unflatten(traced.arguments, traced.program.inputs)[0])
    return Layout(traced, {value: path for path, value in values.items()})


def _freedom(tracker: Tracker, layout: Layout) -> Freedom:
    try:
        walk(tracker, layout.paths)
    except Broken as reason:
        return Freedom("none", str(reason))
    if not tracker.readings and not tracker.squared:
        return Freedom("none", "nothing reads it")
    if tracker.keeps_mean:
        return Freedom("orthogonal", "means over it are taken: the all-ones direction stays", tracker)
    if tracker.squared or tracker.scaled:
        return Freedom("orthogonal", "norms over it or arrays that scale it: lengths stay", tracker)
    if tracker.rigid or not tracker.signs.consistent:
        return Freedom("orthogonal", "an array reads it and makes it: lengths stay", tracker)
    return Freedom("linear", "", tracker)
