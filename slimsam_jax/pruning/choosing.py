"""Chooses the channels that stay: what share, of which groups, and who competes with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.allocation import Costs, Gains, gains_of, global_widths, local_widths
from slimsam_jax.pruning.budgets import BY_COST, widths_by_cost
from slimsam_jax.pruning.grouping import FoundGroup, Grouping
from slimsam_jax.pruning.groups import Scores
from slimsam_jax.pruning.importance import check_choice
from slimsam_jax.pruning.patterns import groups_matching
from slimsam_jax.pruning.selection import keep_widths
from slimsam_jax.pruning.structure import Product, Structure

Allocation = Literal["local", "global", "isomorphic", "params", "macs", "cost"]
Ratio = float | Mapping[str, float]
ALLOCATIONS = ("local", "global", "isomorphic", *BY_COST)


def select(
    scores: Scores,
    ratio: Ratio = 0.5,
    allocation: Allocation = "local",
    round_to: int = 1,
    min_keep: float = 0.0,
    costs: Costs | None = None,
    *,
    grouping: Grouping | None = None,
    ignore: Sequence[str] = (),
    max_ratio: float = 1.0,
    budget: float | None = None,
) -> dict[str, np.ndarray]:
    """Chooses the channels that stay.

    Args:
      scores: of `score`; of some groups only, and those are cut.
      ratio: share to remove, 0 <= ratio < 1: of each group ("local"), of the channels of all groups that compete
        ("global", "isomorphic"), of what they cost (the others). Or {pattern: ratio}, of which the last that fits a
        group counts; those of one pattern compete among themselves, and what none fits, or a ratio of 0, stays whole.
      allocation: who competes. "local": nobody, each group loses the same share. "global": all. "isomorphic": groups
        of one structure among themselves (Fang et al., ECCV 2024). "params", "macs": all, by score per parameter or
        multiply-accumulate of the whole function; "cost": by `costs`.
      round_to: every width that stays is a multiple of it.
      min_keep: share of its channels that each group keeps at any rate; not for "local".
      costs: {group: [size + 1] cost at each width}, for "cost"; measured, say.
      grouping: tells where groups lie, for patterns that name arrays; "isomorphic", "params" and "macs" need it.
      ignore: patterns of what is not cut: groups, by name or by any array or axis that they lie in.
      max_ratio: share of its channels that a group loses at most, as far as `round_to` allows.
      budget: in place of a ratio, what may be left: parameters or multiply-accumulates of the whole function, or of
        what `costs` tells.

    Returns:
      {group: ascending indices, [width] or [copies, width]}; a group that it lacks stays whole.

    Raises:
      InputError: a ratio or a budget that leaves nothing, a pattern that matches nothing, scores that are no numbers.
    """
    _check(scores, ratio, allocation, round_to, min_keep, max_ratio, grouping)
    if budget is not None and allocation not in BY_COST:
        raise InputError(f"a budget needs something that is counted: allocation {', '.join(BY_COST)}")
    left_out = set().union(*(groups_matching("ignore=", pattern, scores, grouping) for pattern in _several(ignore)))
    gains = gains_of({name: score for name, score in scores.items() if name not in left_out})
    if not gains:
        raise InputError("there are no groups to cut: all of them are ignored")
    if allocation in BY_COST:
        if isinstance(ratio, Mapping):
            raise InputError(f"ratios by pattern do not share what {allocation!r} counts: give one ratio, and ignore=")
        limits = (round_to, min_keep, max_ratio)
        widths = widths_by_cost(gains, allocation, ratio, budget, costs, grouping, limits)
        return keep_widths({name: scores[name] for name in widths}, widths)
    widths: dict[str, int] = {}
    for share, competing in _scopes(scores, gains, ratio, allocation, grouping):
        if allocation == "local":
            widths |= local_widths(competing, share, round_to, max_ratio)
        else:
            widths |= global_widths(competing, share, round_to, min_keep, max_ratio)
    return keep_widths({name: scores[name] for name in widths}, widths)


def _scopes(
    scores: Scores, gains: Gains, ratio: Ratio, allocation: str, grouping: Grouping | None
) -> list[tuple[float, Gains]]:
    """(ratio, gains) of the groups that compete."""
    shares = {name: ("", ratio) for name in gains}
    if isinstance(ratio, Mapping):
        shares = {}
        for pattern, share in ratio.items():
            shares |= dict.fromkeys(groups_matching("ratio of ", pattern, scores, grouping), (pattern, share))
    of_name = {group.name: group for group in grouping.groups} if grouping is not None else {}
    scopes: dict[tuple, dict[str, np.ndarray]] = {}
    for name, gain in gains.items():
        pattern, share = shares.get(name, ("", 0.0))
        if share or not isinstance(ratio, Mapping):
            kind = structure_of(of_name[name], grouping) if allocation == "isomorphic" else ()
            scopes.setdefault((pattern, share, kind), {})[name] = gain
    return [(share, competing) for (_, share, _), competing in scopes.items()]


def structure_of(group: FoundGroup, grouping: Grouping) -> tuple:
    """What isomorphic groups have in common: as many members, on the same axes of arrays of the same kind.

    Isomorphic Pruning (Fang et al., ECCV 2024) compares kinds of layers, and whether their inputs or outputs are cut.
    No module says here what an array is: a kernel or not, its rank, the axis, and the group's place in that.
    """
    members = (
        (member.path in grouping.kernels, len(grouping.axes[member.path]), member.axis, _form(member.structure, group))
        for member in group.members
    )
    return tuple(sorted(members, key=repr))


def _form(structure: Structure, group: FoundGroup) -> object:
    if isinstance(structure, str):
        return "own" if structure == group.name else "other"
    if isinstance(structure, int):
        return "whole"
    return ("product" if isinstance(structure, Product) else "sum", *(_form(part, group) for part in structure.parts))


def _several(patterns: str | Sequence[str]) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _check(
    scores: Scores, ratio: Ratio, allocation: str, round_to: int, min_keep: float, max_ratio: float, grouping
) -> None:
    check_choice("allocation", allocation, ALLOCATIONS)
    for pattern, share in ratio.items() if isinstance(ratio, Mapping) else ((None, ratio),):
        if not 0 <= share < 1:
            of = "" if pattern is None else f" of {pattern!r}"
            raise InputError(f"ratio {share}{of} would leave no channel of a group; it must be from 0 to below 1")
    for what, value in (("min_keep", min_keep), ("max_ratio", max_ratio)):
        if not 0 <= value <= 1:
            raise InputError(f"{what} {value} is not a share, from 0 to 1")
    if round_to < 1 or round_to != int(round_to):
        raise InputError(f"round_to {round_to} is not a number of channels")
    if not scores:
        raise InputError("there are no groups to cut")
    for name, score in scores.items():
        if not np.isfinite(score).all():
            raise InputError(f"the scores of group {name!r} are not all finite numbers: nothing says what may go")
    if allocation in ("isomorphic", "params", "macs"):
        if grouping is None:
            raise InputError(f"allocation {allocation!r} needs grouping=, which says where the groups lie")
        if missing := sorted(scores.keys() - grouping.widths.keys()):
            raise InputError(f"there is no group {missing[0]!r} in the grouping")
