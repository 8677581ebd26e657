"""Draws tables, for slides: what `python -m experiments.tables` draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import crossing, fair, results, slimming
from experiments.rows import TABLES
from slimsam_jax.files import replacing

COLOURS = {"default": "C0", "taylor": "C1", "slimsam": "C3"}
MEASURES = {"point": "point mIoU, %", "agreement": "agreement with the teacher's masks, %"}


def draw() -> None:
    """Writes steps.png, of the results of `fair`, and criteria.png, of those of `slimming`."""
    results.FIGURE_FOLDER.mkdir(exist_ok=True)
    lengths = [entry for entry in results.read(fair.FILE) if entry["ratio"] == slimming.RATIO]
    recipes = {recipe: own for (recipe,), own in crossing.grouped(lengths, "recipe").items()}
    _save("steps", lambda axes, key: _against_steps(axes, key, recipes))
    measured = results.read(slimming.FILE)
    rows = {label: slimming.runs_of(row, measured) for label, row in TABLES["criteria"].rows.items()}
    if any(rows.values()):
        _save("criteria", lambda axes, key: _criteria(axes, key, rows))


def _save(name: str, panel: Callable[[Any, str], None]) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), MEASURES, strict=True):
        panel(axes, key)
        axes.grid(alpha=0.3)
    with replacing(results.FIGURE_FOLDER / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _against_steps(axes: Any, key: str, recipes: dict[str, Sequence[dict[str, Any]]]) -> None:
    """A line for each recipe, at the rate that was chosen for each length; mean and deviation of the seeds."""
    for name in (name for name in COLOURS if name in recipes):
        points = []
        for (steps,), own in sorted(crossing.grouped(recipes[name], "steps").items()):
            rate = crossing.best_rate(own)
            points.append((steps, *_spread([run for run in own if run["rate"] == rate], key)))
        axes.errorbar(*zip(*points, strict=True), marker="o", capsize=3, color=COLOURS[name], label=name)
    axes.set_xscale("log")
    axes.set(xlabel="steps of four images, 77 % of the channels removed", ylabel=MEASURES[key])
    axes.legend()


def _criteria(axes: Any, key: str, rows: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Points, as bars would have to begin at 0."""
    for label, runs in reversed(rows.items()):
        if runs:
            mean, deviation = _spread(runs, key)
            colour = "C0" if "default" in label else "C7"
            axes.errorbar([mean], [label], xerr=[deviation], fmt="o", capsize=3, color=colour)
    axes.set_xlabel(MEASURES[key])
    axes.margins(y=0.1)


def _spread(runs: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Computes mean and standard deviation over seeds, in %; 0 spread of a single seed."""
    values = 100 * np.array([run[key] for run in runs])
    return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
