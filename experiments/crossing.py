"""Where two recipes' errors would meet if each went on falling with the steps as it does: lines of logarithms.

A power of the number of steps is fitted to the error after 24, 100, 400, ... steps. For the intervals a seed is drawn
anew for each length, many times. An error that has a floor, as every slim model's has, falls more slowly in the end
than its line: what is far beyond the last length is a guess, and stands there as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import results

ROW = ("teacher", "sha256", "data", "ratio", "images", "photographs")
PAPER = 100_000  # optimizer steps of both distillations: 20 epochs each, 10,000 images, batches of 4
DRAWS = 2000


def lines_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table, its head first: each pair of recipes that have errors of at least two same lengths."""
    lines = ["| teacher | ratio | recipes | steps | slopes | where they meet, 5 to 95 % | meet by the paper's steps |"]
    lines.append("|---" * 7 + "|")
    for row, own in grouped(entries, *ROW).items():
        errors = {recipe: errors_of(some) for (recipe,), some in grouped(own, "recipe").items()}
        for a, b in itertools.combinations(errors, 2):
            lengths = sorted(errors[a].keys() & errors[b].keys())
            for some in dict.fromkeys((tuple(lengths), tuple(lengths[-2:]))):
                if len(some) > 1:
                    pair = [{count: errors[recipe][count] for count in some} for recipe in (a, b)]
                    begin = [results.called(row[0]), f"{row[3]:g}", f"{a}, {b}", ", ".join(map(str, some))]
                    lines.append(f"| {' | '.join([*begin, *cells_of(*pair)])} |")
    return lines


def errors_of(entries: Sequence[Mapping[str, Any]]) -> dict[int, list[float]]:
    """{steps: errors of the seeds} of one recipe, at the rate that was chosen for that length."""
    errors = {}
    for (count,), own in sorted(grouped(entries, "steps").items()):
        whole = [entry for entry in own if entry["rate"] == best_rate(own) and "failed" not in entry]
        if whole:
            errors[count] = [entry["photos error"] for entry in whole]
    return errors


def best_rate(entries: Sequence[Mapping[str, Any]]) -> float:
    """The rate that the photographs to choose by have chosen, with the first seed."""
    first = min(entry["seed"] for entry in entries)
    return max((e for e in entries if e["seed"] == first), key=lambda entry: entry["chosen_by"])["rate"]


def grouped(entries: Sequence[Mapping[str, Any]], *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """{values of these fields: entries that have them}; lists become tuples."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        values = tuple(tuple(v) if isinstance(v := entry[name], list) else v for name in names)
        groups.setdefault(values, []).append(entry)
    return groups


def cells_of(a: Mapping[int, Sequence[float]], b: Mapping[int, Sequence[float]]) -> list[str]:
    """Slopes, where the lines meet, and the share of draws that meet within the paper's steps."""
    slopes, met = meetings(a, b)
    shown = ", ".join(f"{slope:.2f}" for slope in np.median(slopes, axis=0))
    low, middle, high = np.quantile(met, (0.05, 0.5, 0.95), method="nearest")
    word = lambda steps: f"{steps:.2g}" if np.isfinite(steps) else "never"
    return [shown, f"{word(middle)} ({word(low)} to {word(high)})", f"{100 * np.mean(met <= PAPER):.0f} % of draws"]


def meetings(
    a: Mapping[int, Sequence[float]], b: Mapping[int, Sequence[float]], draws: int = DRAWS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [draws, 2] of both lines, and the number of steps [draws] at which they meet.

    Where they meet before the first length, or never, it is infinite: the one that is ahead stays ahead.

    Args:
      a, b: {steps: errors of the seeds}, of the same steps.
      draws: of one seed a length.
      seed: of the draws.
    """
    random, steps = np.random.default_rng(seed), sorted(a)
    x = np.log(steps)
    lines = [np.polyfit(x, np.log([random.choice(errors[s], draws) for s in steps]), 1) for errors in (a, b)]
    (slope_a, start_a), (slope_b, start_b) = lines
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        met = np.exp((start_b - start_a) / (slope_a - slope_b))
    return np.stack([slope_a, slope_b], 1), np.where(met >= steps[0], met, np.inf)
