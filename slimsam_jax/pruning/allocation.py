"""Allocates widths by the gain of channels: a share of the channels, or as many as a budget buys."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from slimsam_jax.pruning.groups import Scores

Gains = Mapping[str, np.ndarray]  # group name -> [size] gain of each further channel, falling


def rounded_width(size: int, ratio: float, round_to: int = 1) -> int:
    """Returns how many of `size` channels stay: the multiple of `round_to` nearest to size * (1 - ratio), at least one.

    A size below `round_to` stays as it is.

    Raises:
      ValueError: ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is not the share of channels to remove, 0 <= ratio < 1")
    exact = size * (1 - ratio)
    if size < round_to:
        return size
    return round_to * min(size // round_to, max(1, int(exact / round_to + 0.5)))


def gains_of(scores: Scores) -> dict[str, np.ndarray]:
    """Returns the gain of each further channel of a group, the best first: {group: [size], falling}."""
    falling = {name: -np.sort(-np.atleast_2d(score), axis=1) for name, score in scores.items()}
    return {name: by_copy.sum(axis=0) for name, by_copy in falling.items()}


def narrowest(size: int, round_to: int = 1, min_keep: float = 0.0, max_ratio: float = 1.0) -> int:
    """Returns the fewest of `size` channels that may stay, a multiple of `round_to` (of a narrower group: all).

    Args:
      min_keep: share that stays, rounded down; at least one channel.
      max_ratio: share that may go, rounded down, as far as `round_to` allows.
    """
    chunk = min(round_to, size)
    least = math.ceil((1 - max_ratio) * size / chunk - 1e-9)
    return chunk * max(1, int(min(min_keep, 1.0) * size / chunk), min(least, size // chunk))


def local_widths(gains: Gains, ratio: float, round_to: int = 1, max_ratio: float = 1.0) -> dict[str, int]:
    """Keeps the same share of every group, to the nearest multiple of `round_to`. Returns {group: width}."""
    sizes = {name: len(gain) for name, gain in gains.items()}
    least = {name: narrowest(size, round_to, max_ratio=max_ratio) for name, size in sizes.items()}
    return {name: max(least[name], rounded_width(size, ratio, round_to)) for name, size in sizes.items()}


def global_widths(
    gains: Gains, ratio: float, round_to: int = 1, min_keep: float = 0.0, max_ratio: float = 1.0
) -> dict[str, int]:
    """Keeps the channels of highest gain over all groups; exactly the asked share in all, if `min_keep` allows.

    Channels compete in chunks of `round_to`, best first within their group, so rounding
    costs the least important ones. What a group has beyond its last whole chunk goes.

    Args:
      gains: {group: [size], falling}, comparable between groups.
      ratio: share of the pooled channels to remove.
      round_to: every width that stays is a multiple of this (a narrower group keeps its width).
      min_keep: share of its channels that every group keeps at any rate, and at least one chunk of `round_to`.
      max_ratio: share of its channels that a group loses at most.

    Returns:
      {group: width}.
    """
    chunks = []  # (mean gain, group, width), the guaranteed ones with infinite gain
    for name, gain in gains.items():
        chunk = min(round_to, len(gain))
        guaranteed = narrowest(len(gain), round_to, min_keep, max_ratio) // chunk
        for i in range(len(gain) // chunk):
            mean = np.inf if i < guaranteed else gain[i * chunk : (i + 1) * chunk].mean()
            chunks.append((mean, name, chunk))
    chunks.sort(key=lambda chunk: -chunk[0])
    left = rounded_width(sum(map(len, gains.values())), ratio, round_to)
    widths = dict.fromkeys(gains, 0)
    for mean, name, chunk in chunks:
        if mean == np.inf or left >= chunk:
            widths[name] += chunk
            left -= chunk
    return widths


Costs = Mapping[str, np.ndarray]  # group name -> [size + 1] cost of the group at each width, 0 included


class TooSmall(ValueError):
    """The budget is below what the narrowest widths cost."""


def allocate(
    gains: Gains, costs: Costs, budget: float, round_to: int = 1, min_keep: float = 0.0, max_ratio: float = 1.0
) -> dict[str, int]:
    """Chooses the widths of all groups that gain most within a budget.

    At a price per unit of cost, every group takes the width at which its gain less its cost
    is greatest; the lowest price that keeps the budget is found by bisection (Everett 1963).
    What is left then buys single steps, the best gain per cost first, until none fits. Costs
    may bend and jump, as measured times do.

    Args:
      gains: {group: [size], falling}, comparable between groups.
      costs: {group: [size + 1]}, not falling.
      budget: what all groups may cost together.
      round_to, min_keep, max_ratio: as in `global_widths`.

    Returns:
      {group: width}; their costs together are at most `budget`.

    Raises:
      TooSmall: even the narrowest cost more.
      ValueError: a gain is negative, or not a number.
    """
    if not all(np.min(gain) >= 0 for gain in gains.values()):
        raise ValueError("gains must be numbers, and not negative")
    steps = {name: _allowed(len(gain), round_to, min_keep, max_ratio) for name, gain in gains.items()}
    value = {name: np.concatenate([[0.0], np.cumsum(gain)]) for name, gain in gains.items()}
    total = lambda widths: sum(costs[name][width] for name, width in widths.items())
    smallest = {name: int(widths[0]) for name, widths in steps.items()}
    if total(smallest) > budget:
        raise TooSmall(f"{budget:.6g} is less than the {total(smallest):.6g} that the narrowest cost")

    def at_price(price: float) -> dict[str, int]:
        profit = lambda name: value[name][steps[name]] - price * np.asarray(costs[name])[steps[name]]
        return {name: int(steps[name][np.argmax(profit(name))]) for name in steps}

    low, high = 0.0, 1.0
    while total(at_price(high)) > budget and high < 1e300:
        low, high = high, 8 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if total(at_price(middle)) <= budget else (middle, high)
    widths = at_price(high)
    return _spend(widths if total(widths) <= budget else smallest, steps, value, costs, budget)


def _allowed(size: int, round_to: int, min_keep: float, max_ratio: float) -> np.ndarray:
    """Returns the widths that a group may have, ascending."""
    return np.arange(narrowest(size, round_to, min_keep, max_ratio), size + 1, min(round_to, size))


def _spend(widths: dict[str, int], steps, value, costs: Costs, budget: float) -> dict[str, int]:
    """Widens groups by single steps while the budget lasts."""
    spent = sum(costs[name][width] for name, width in widths.items())
    while True:
        best = None
        for name, width in widths.items():
            wider = steps[name][steps[name] > width][:1]
            if not len(wider) or spent + (price := costs[name][wider[0]] - costs[name][width]) > budget:
                continue
            rate = (value[name][wider[0]] - value[name][width]) / max(price, 1e-300)
            if best is None or rate > best[0]:
                best = rate, name, int(wider[0]), price
        if best is None:
            return widths
        _, name, width, price = best
        widths, spent = {**widths, name: width}, spent + price
