"""Chooses widths by what channels cost: a table, or the parameters or multiply-accumulates of the whole function."""

from __future__ import annotations

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.allocation import Costs, Gains, TooSmall, allocate, narrowest
from slimsam_jax.pruning.costs import COSTS, table
from slimsam_jax.pruning.grouping import Grouping

BY_COST = (*COSTS, "cost")
HALVINGS = 25  # of the range that a budget is looked for in: far below one channel


def widths_by_cost(
    gains: Gains,
    allocation: str,
    ratio: float,
    budget: float | None,
    costs: Costs | None,
    grouping: Grouping | None,
    limits: tuple[int, float, float],
) -> dict[str, int]:
    """Chooses the widths that gain most within a budget; see `choosing.select`.

    Args:
      gains: {group: [size], falling}, not negative.
      limits: round_to, min_keep and max_ratio.
    """
    if budget is not None and not budget > 0:
        raise InputError(f"budget {budget} leaves nothing; it must be above 0")
    if negative := [name for name, gain in gains.items() if gain[-1] < 0]:
        raise InputError(
            f"scores of group {negative[0]!r} are negative and have no price: normalise otherwise (minmax)"
        )
    try:
        if allocation != "cost":
            return _widths_of_whole(gains, allocation, ratio, budget, grouping, limits)
        costs = check_costs(gains, costs)
        total = sum(costs[name][-1] for name in gains)
        return allocate(gains, costs, (1 - ratio) * total if budget is None else budget, *limits)
    except TooSmall as error:
        raise InputError(f"{f'ratio {ratio}' if budget is None else f'budget {budget}'}: {error}") from None


def check_costs(gains: Gains, costs: Costs | None) -> dict[str, np.ndarray]:
    """The tables as arrays.

    Raises:
      InputError: there are none, a group is missing, or a table is not [size + 1] numbers that do not fall.
    """
    if costs is None:
        raise InputError("allocation 'cost' needs costs={group: [size + 1] cost at each width}")
    if missing := sorted(gains.keys() - costs.keys()):
        raise InputError(f"costs lack the group {missing[0]!r}")
    tables = {name: np.asarray(costs[name], np.float64) for name in gains}
    for name, of_group in tables.items():
        if of_group.shape != (len(gains[name]) + 1,):
            raise InputError(f"costs of group {name!r} have shape {of_group.shape}, not ({len(gains[name]) + 1},)")
        if not (np.isfinite(of_group).all() and of_group[0] >= 0 and (np.diff(of_group) >= 0).all()):
            raise InputError(f"costs of group {name!r} must be finite, not negative, and not fall as it gets wider")
    return tables


def _widths_of_whole(
    gains: Gains,
    kind: str,
    ratio: float,
    budget: float | None,
    grouping: Grouping,
    limits: tuple[int, float, float],
) -> dict[str, int]:
    """Groups that meet in one array share its cost, so that no table of each by itself adds up to the whole.

    The table at full width is right about prices. The budget that is spent by it is the
    greatest with which the whole function, counted exactly, keeps the budget that was asked for.
    """
    count, full = COSTS[kind](grouping), grouping.widths
    prices = table(count, full, gains)
    wanted = (1 - ratio) * count(full) if budget is None else budget
    smallest = {name: narrowest(len(gain), *limits) for name, gain in gains.items()}
    if (least := count({**full, **smallest})) > wanted:
        raise TooSmall(f"{wanted:.6g} {kind} are less than the {least:.6g} that the narrowest have")
    low, high = (sum(prices[name][widths[name]] for name in gains) for widths in (smallest, full))
    best, middle = smallest, high
    for _ in range(HALVINGS):
        widths = allocate(gains, prices, middle, *limits)
        if count({**full, **widths}) <= wanted:
            best, low = widths, middle
        else:
            high = middle
        middle = (low + high) / 2
    return best
