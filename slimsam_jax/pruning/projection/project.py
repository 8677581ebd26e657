"""Changes the basis of all groups whose basis is free, then cuts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.allocation import rounded_width
from slimsam_jax.pruning.grouping import FoundGroup, Grouping
from slimsam_jax.pruning.groups import Keep, Tree, by_path
from slimsam_jax.pruning.projection import linear, streams, units
from slimsam_jax.pruning.projection.freedom import Freedom, freedom, layout_of
from slimsam_jax.pruning.projection.layout import Layout
from slimsam_jax.pruning.projection.states import Reading
from slimsam_jax.pruning.projection.work import Work
from slimsam_jax.pruning.unfolding import check_shapes

WHOLE = "left whole: all of its channels stay"


class Projected(NamedTuple):
    """What `project` returns.

    Attributes:
      params: the cut tree, numpy, for `grouping.run(params, *inputs, keep=keep, recount=True)`, or for the function's
        own class at the new widths.
      keep: {group: indices} of the widths: of directions where a basis was changed, of channels of units chosen.
      how: {group: what was done, or why it was left whole} of all groups, in words.
    """

    params: Tree
    keep: Keep
    how: dict[str, str]


class Plan(NamedTuple):
    """What is to be done with each group.

    Attributes:
      group: that is to be projected.
      freedom: of its basis.
      reading: the linear map to refit, for a group whose basis is not free.
      width: channels that stay.
    """

    group: FoundGroup
    freedom: Freedom
    reading: Reading | None
    width: int


def project(
    params: Tree,
    grouping: Grouping,
    batches: Iterable[Sequence[Any]],
    ratio: float = 0.5,
    widths: Mapping[str, int] | None = None,
    moments: Mapping[str, Any] | None = None,
) -> Projected:
    """Rotates streams onto their leading directions, gives linear groups their best basis, and chooses hidden units.

    In this order, each on moments of the function as it is cut by then; see `freedom`. At full width a change of basis
    leaves the function the same. A stream that LayerNorms read keeps its mean, as one of its directions. The scales of
    norms move into what reads them. Behind a nonlinearity units are chosen greedily, and the one linear map that reads
    them is refitted by least squares. Groups for which none of this is possible stay whole.

    Args:
      params: the tree that was traced.
      batches: each a tuple of the function's inputs, of the shapes that were traced; run up to three times.
      ratio: share of the channels that goes, of every group that can be projected.
      widths: {group: channels that stay}, in place of the ratio. A group that keeps all of its channels by the ratio
        is left as it is; by `widths` its basis is changed all the same.
      moments: {group: [D, D] second moment} of streams, in place of what is captured: weighted, say.

    Raises:
      InputError: no group can be projected, or one of `widths` cannot or is narrower than its width; moments of another
        shape, or not finite; there are no batches, or parameters and inputs are not those that were traced.
    """
    free = freedom(grouping)
    check_shapes(by_path(params), grouping, grouping.widths)
    layout, count = layout_of(grouping), len(jax.tree.leaves(params))
    leaves = [grouping.traced.leaves(params, tuple(inputs))[count:] for inputs in batches]
    if not leaves:
        raise InputError("there are no batches to take moments of")
    plans, how = _plans(grouping, layout, free, ratio, widths or {})
    given = _check_moments(grouping, free, moments or {})
    work = Work(params, grouping, layout, leaves)
    of_kind = lambda kind: [plan for plan in plans if plan.freedom.kind == kind]
    how |= _rotate(work, of_kind("orthogonal"), given)
    how |= _change_bases(work, of_kind("linear"))
    how |= _choose_units(work, of_kind("none"))
    return Projected(work.tree(), work.keep, {name: how[name] for name in grouping.widths})


def _plans(
    grouping: Grouping, layout: Layout, free: Mapping[str, Freedom], ratio: float, widths: Mapping[str, int]
) -> tuple[list[Plan], dict[str, str]]:
    """What to do, and why the other groups are left whole."""
    if unknown := sorted(widths.keys() - grouping.widths.keys()):
        raise InputError(f"there is no group {unknown[0]!r} to project")
    if not 0 <= ratio < 1:
        raise InputError(f"ratio is the share of channels that goes, from 0 to below 1; it is {ratio}")
    plans, left = [], {}
    for group in grouping.groups:
        own, reading = free[group.name], None
        if own.kind == "none":
            reading = units.reader_of(group, grouping, layout)
        if isinstance(reading, str):
            left[group.name] = f"left whole: {own.why}; {reading}"
            if group.name in widths:
                raise InputError(f"group {group.name!r} cannot be projected: {own.why}; {reading}")
            continue
        width = _width(group, widths.get(group.name, rounded_width(group.size, ratio)))
        if width < group.size or (group.name in widths and reading is None):
            plans.append(Plan(group, own, reading, width))
        else:
            left[group.name] = WHOLE
    if all(why != WHOLE for why in left.values()) and not plans:
        name, why = next(iter(left.items()))
        raise InputError(f"no group can be projected; {name} is {why}")
    return plans, left


def _width(group: FoundGroup, width: Any) -> int:
    if isinstance(width, bool) or not isinstance(width, int | np.integer) or not 1 <= width <= group.size:
        raise InputError(f"group {group.name!r} has {group.size} channels; {width!r} of them cannot stay")
    return int(width)


def _check_moments(
    grouping: Grouping, free: Mapping[str, Freedom], moments: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    checked = {}
    for name, moment in moments.items():
        if name not in free or free[name].kind != "orthogonal":
            raise InputError(f"moments are of groups that are rotated, and {name!r} is none")
        size, array = grouping.widths[name], np.asarray(moment, np.float64)
        if array.shape != (size, size):
            raise InputError(f"the moment of group {name!r} must be [{size}, {size}]; it is {list(array.shape)}")
        if not np.isfinite(array).all():
            raise InputError(f"the moment of group {name!r} is not finite")
        checked[name] = array[None]
    return checked


def _rotate(work: Work, plans: Sequence[Plan], given: Mapping[str, np.ndarray]) -> dict[str, str]:
    asked = {p.group.name: streams.questions_of(p.group, p.freedom.known) for p in plans if p.group.name not in given}
    found = work.capture({question for own in asked.values() for question in own})
    how = {}
    for group, free, _, width in plans:
        moment = given.get(group.name)
        if moment is None:
            moment = streams.moment_of([found[question] for question in asked[group.name]], free.known)
        how[group.name] = streams.rotate(work, group, free.known, moment, width)
    return how


def _change_bases(work: Work, plans: Sequence[Plan]) -> dict[str, str]:
    asked = [question for p in plans for question in linear.questions_of(work, p.group, p.freedom.known)]
    found = work.capture(set(asked))
    return {p.group.name: linear.change_basis(work, p.group, p.freedom.known, found, p.width) for p in plans}


def _choose_units(work: Work, plans: Sequence[Plan]) -> dict[str, str]:
    asked = {p.group.name: units.question_of(work, p.group, p.reading) for p in plans}
    found, how = work.capture(set(asked.values())), {}
    for group, _, reading, width in plans:
        how[group.name] = units.choose(work, group, reading, found[asked[group.name]], width)
    return how
