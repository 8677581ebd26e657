"""Draws the tables of slimming, for slides: what `python -m experiments.tables` draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import results
from experiments.rows import TABLES, Row
from slimsam_jax.files import replacing

FOLDER = results.FOLDER.parent / "figures"
COLOURS = {"default": "C0", "taylor": "C1", "slimsam": "C3"}
MEASURES = {"point": "point mIoU, %", "agreement": "agreement with the teacher's masks, %"}
RunsOf = Callable[[Row, float], list[dict[str, Any]]]  # what has been measured of a row at a ratio


def draw(runs_of: RunsOf, teacher: float) -> None:
    """Writes figures/*.png.

    Args:
      teacher: its point mIoU.
    """
    FOLDER.mkdir(exist_ok=True)
    _save("ratio", lambda axes, key: _against_ratio(axes, key, runs_of), teacher)
    _save("steps", lambda axes, key: _against_steps(axes, key, runs_of), teacher)
    _save("criteria", lambda axes, key: _criteria(axes, key, runs_of), None)


def _save(name: str, panel: Callable[[Any, str], None], teacher: float | None) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        panel(axes, key)
        if teacher is not None:
            axes.axhline(100 * teacher if key == "point" else 100, color="grey", linestyle=":", label="teacher")
            axes.set_ylabel(label)
            axes.legend()
        else:
            axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    with replacing(FOLDER / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _against_ratio(axes: Any, key: str, runs_of: RunsOf) -> None:
    table = TABLES["compression"]
    for name in COLOURS:
        points = [(ratio, *_spread(runs_of(table.rows[name], ratio), key)) for ratio in table.ratios]
        _curve(axes, name, points)
    axes.set(xlabel="share of the channels removed", xticks=table.ratios)


def _against_steps(axes: Any, key: str, runs_of: RunsOf) -> None:
    for name in COLOURS:
        rows = [row for row in TABLES["efficiency"].rows.values() if row.recipe == name]
        _curve(axes, name, [(row.steps, *_spread(runs_of(row, 0.77), key)) for row in rows])
    axes.set_xscale("symlog", linthresh=25)
    axes.set_xlabel("steps of four images in each distillation, 77 % of the channels removed")


def _criteria(axes: Any, key: str, runs_of: RunsOf) -> None:
    rows = {label: _spread(runs_of(row, 0.77), key) for label, row in TABLES["criteria"].rows.items()}
    rows = {label: spread for label, spread in rows.items() if np.isfinite(spread[0])}
    for label, (mean, deviation) in rows.items():  # points, as bars would have to begin at 0
        axes.errorbar([mean], [label], xerr=[deviation], fmt="o", capsize=3, color="C0" if "ours" in label else "C7")
    axes.margins(y=0.1)


def _curve(axes: Any, name: str, points: list[tuple[float, float, float]]) -> None:
    points = [point for point in points if np.isfinite(point[1])]
    if points:
        x, means, deviations = zip(*points, strict=True)
        axes.errorbar(x, means, deviations, marker="o", capsize=3, color=COLOURS[name], label=name)


def _spread(runs: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Computes mean and standard deviation over seeds, in %; nan if nothing was measured, 0 spread of a single seed."""
    values = 100 * np.array([run[key] for run in runs])
    return (values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0) if len(values) else (np.nan, 0.0)
