"""Worth of channels -> widths: by a share of the channels, or as many as a budget buys."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slimsam_jax.pruning.groups import Scores

Worth = Mapping[str, np.ndarray]  # group name -> [size] what each further channel adds, falling


def rounded_width(size: int, ratio: float, multiple: int = 1) -> int:
    """Channels that stay of `size`: the nearest multiple to size * (1 - ratio), at least one.

    A size below one multiple stays as it is.

    Raises:
      ValueError: ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is not the share of channels to remove, 0 <= ratio < 1")
    wanted = size * (1 - ratio)
    if size < multiple:
        return size
    return multiple * min(size // multiple, max(1, int(wanted / multiple + 0.5)))


def worth_of(scores: Scores) -> dict[str, np.ndarray]:
    """What each further channel of a group adds, the best first: {group: [size], falling}."""
    fall = {name: -np.sort(-np.atleast_2d(score), axis=1) for name, score in scores.items()}
    return {name: by_copy.sum(axis=0) for name, by_copy in fall.items()}


def local_widths(worth: Worth, ratio: float, multiple: int = 1) -> dict[str, int]:
    """The same share of every group, to the nearest multiple."""
    return {name: rounded_width(len(gains), ratio, multiple) for name, gains in worth.items()}


def global_widths(worth: Worth, ratio: float, multiple: int = 1, least: float = 0.0) -> dict[str, int]:
    """Widths by worth, wherever it lies; together exactly the share of all channels that stays, if `least` allows.

    Channels compete in chunks of `multiple`, best first within their group, so rounding
    costs the least important ones. What a group has beyond its last whole chunk goes.

    Args:
      worth: {group: [size], falling}, comparable between groups.
      ratio: share of the pooled channels to remove.
      multiple: every width that stays is a multiple of this (a narrower group keeps its width).
      least: share of its channels that every group keeps at any rate, and one multiple at least.
    """
    chunks = []  # (mean worth, group, width), the guaranteed ones with infinite worth
    for name, gains in worth.items():
        chunk = min(multiple, len(gains))
        guaranteed = max(1, int(least * len(gains) / chunk))
        for i in range(len(gains) // chunk):
            mean = np.inf if i < guaranteed else gains[i * chunk : (i + 1) * chunk].mean()
            chunks.append((mean, name, chunk))
    chunks.sort(key=lambda chunk: -chunk[0])
    left = rounded_width(sum(map(len, worth.values())), ratio, multiple)
    widths = dict.fromkeys(worth, 0)
    for mean, name, chunk in chunks:
        if mean == np.inf or left >= chunk:
            widths[name] += chunk
            left -= chunk
    return widths


Costs = Mapping[str, np.ndarray]  # group name -> [size + 1] cost of the group at each width, 0 included


class TooSmall(ValueError):
    """The budget is below what the narrowest widths cost."""


def allocate(worth: Worth, costs: Costs, budget: float, multiple: int = 1, least: float = 0.0) -> dict[str, int]:
    """Chooses the widths of all groups.

    At a price per unit of cost, every group takes the width at which its worth less its cost
    is greatest; the lowest price that keeps the budget is found by bisection (Everett 1963).
    What is left then buys single steps, the best worth per cost first, until none fits. Costs
    may bend and jump, as measured times do.

    Args:
      worth: {group: [size], falling}, comparable between groups.
      costs: {group: [size + 1]}, not falling.
      budget: what all groups may cost together.
      multiple, least: as in `global_widths`.

    Returns:
      {group: width}; their costs together are at most `budget`.

    Raises:
      TooSmall: even the narrowest cost more.
      ValueError: a worth is negative, or not a number.
    """
    if not all(np.min(gains) >= 0 for gains in worth.values()):
        raise ValueError("worth must be a number, and not negative")
    steps = {name: _allowed(len(gains), multiple, least) for name, gains in worth.items()}
    value = {name: np.concatenate([[0.0], np.cumsum(gains)]) for name, gains in worth.items()}
    total = lambda widths: sum(costs[name][width] for name, width in widths.items())
    smallest = {name: int(widths[0]) for name, widths in steps.items()}
    if total(smallest) > budget:
        raise TooSmall(f"{budget:.6g} is less than the {total(smallest):.6g} that the narrowest cost")

    def at_price(price: float) -> dict[str, int]:
        gain = lambda name: value[name][steps[name]] - price * np.asarray(costs[name])[steps[name]]
        return {name: int(steps[name][np.argmax(gain(name))]) for name in steps}

    low, high = 0.0, 1.0
    while total(at_price(high)) > budget and high < 1e300:
        low, high = high, 8 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if total(at_price(middle)) <= budget else (middle, high)
    widths = at_price(high)
    return _spend(widths if total(widths) <= budget else smallest, steps, value, costs, budget)


def _allowed(size: int, multiple: int, least: float) -> np.ndarray:
    """Ascending widths that a group may have."""
    chunk = min(multiple, size)
    return chunk * np.arange(max(1, int(min(least, 1.0) * size / chunk)), size // chunk + 1)


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
