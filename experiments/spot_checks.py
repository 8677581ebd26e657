"""Measures some rows of the tables again: does today's code still give what they hold?

    python -m experiments.spot_checks run --images bsds_train --val bsds_val
    python -m experiments.spot_checks table

`experiments.remake` makes everything anew, in a day; this takes an hour or two. Programs keep what they measure in a
folder of its own, where they find nothing that is done. Training is chaotic to the last bit, which another processor
changes: a value holds if it is within two spreads of seeds, or, of a row that has one seed, within a fiftieth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import remake, results
from slimsam_jax import cli, data
from slimsam_jax.errors import InputError, RunError

FILE = results.FOLDER / "spot_checks.jsonl"


class Spot(NamedTuple):
    """Rows that are measured again.

    Attributes:
      file: of results.
      command: as those of a `remake.Part`.
      keys: fields that tell rows apart, but for the seed.
      values: fields that are compared.
    """

    file: str
    command: str
    keys: tuple[str, ...]
    values: tuple[str, ...]


LEARNED = ("teacher", "row", "images", "steps", "rate", "photographs")


def of_30(row: str, rate: float) -> Spot:
    """A row of `experiments.distillers`, of 30 images with 300 steps."""
    given = "--teacher {shipped} --images {images} --val {val} --cache {work} --limits 30 --seeds 0"
    command = f"experiments.distillers run {given} --rates {rate} --only '{row}'"
    return Spot("distillers.jsonl", command, LEARNED, ("agreement", "point", "error"))


SPOTS = {  # by the names of parts of `experiments.remake`; behind a colon which rows, if there are several spots
    "fair": Spot(
        "fair.jsonl",
        "experiments.fair run --teachers {shipped} --images {images} --photos {photos} --val {val} --ratios 0.77 "
        "--recipes default --seeds 0",
        (*LEARNED, "sha256", "data"),
        ("agreement", "val agreement", "val point", "photos error"),
    ),
    "distillers: default": of_30("default, 77 %", 0.3333),
    "distillers: mobile_sam": of_30("mobile_sam, tiny_vit_small", 3),
    "distillers: edge_sam": of_30("edge_sam, rep_vit_small", 0.3333),
    "hierarchical": Spot(
        "hierarchical.jsonl",
        "experiments.hierarchical run --teacher {shipped} --images {photos}",
        ("teacher", "picture", "way"),
        ("flat_masks", "masks", "known", "prompts"),
    ),
    "teacher_card": Spot(
        "teacher_card.jsonl",
        "experiments.teacher_card run {shipped} --images {val} --limit 60",
        ("teacher", "sha256", "data", "images"),
        ("point_miou", "box_miou", "oracle_miou", "predicted"),
    ),
    "teachers": Spot(
        "teachers.jsonl",
        "experiments.teachers run --teachers {shipped} --images {images} --val {photos} --seeds 0",
        ("teacher", "sha256", "images", "what", "ratio", "val"),
        ("error", "agreement"),
    ),
    "estimators": Spot(
        "estimators.jsonl",
        "experiments.estimators run --teacher {shipped} --images {images} --val {val} --seeds 0 --counts 10",
        ("teacher", "estimator", "images"),
        ("error",),
    ),
    "pruning": Spot(
        "pruning.jsonl",
        "experiments.pruning run --teacher {shipped} --images {images} --val {val} --seeds 0 --only taylor default",
        ("teacher", "row", "ratio", "images"),
        ("error", "point_miou"),
    ),
    "slimming": Spot(
        "slimming.jsonl",
        "experiments.slimming run --teacher {shipped} --images {images} --val {val} --cache {work} --seeds 0 "
        "--only default taylor",
        ("teacher", "sha256", "recipe", "set", "steps", "ratio"),
        ("error", "agreement", "point"),
    ),
    "quantization": Spot(
        "quantization.jsonl",
        "experiments.quantization run {shipped} --calibration {images} --images {val} --limit 12 --seeds 0 --rows W8 "
        "'W4, 10 layers float'",
        ("model", "row", "images", "calibration_images"),
        ("agreement", "embedding_error", "megabytes"),
    ),
}
SPREADS, SHARE = 2.0, 0.02  # within which a value holds: of seeds, or of itself


def run(images: Path, val: Path, photos: Path = remake.PHOTOS, only: tuple[str, ...] = ()) -> None:
    """Measure rows again, and add how they compare to experiments/results/spot_checks.jsonl.

    Args:
      images: annotated photographs that the kept rows learned from.
      val: annotated photographs that they were measured on.
      photos: photographs that they were measured on.
      only: these alone, by their names in the table.

    Raises:
      InputError: the code is no commit's, or a name is unknown.
      RunError: a program failed, or no row is kept like one that it measured.
    """
    if unknown := set(only) - set(SPOTS):
        raise InputError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(SPOTS)}")
    results.check_committed()
    for name in only or SPOTS:
        spot = SPOTS[name]
        with tempfile.TemporaryDirectory() as folder:
            paths = {"images": images, "val": val, "photos": photos, "work": folder, "shipped": data.embedded_teacher()}
            remake.run(remake.arguments_of(spot.command, paths), name, **{results.ELSEWHERE: folder})
            again = results.read(Path(folder) / spot.file)
        for entry in compared(spot, again, results.read(results.FOLDER / spot.file)):
            results.append(FILE, {"part": name, **entry})


def compared(spot: Spot, again: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sets each row that was measured again beside the kept one, with the spread of its values over seeds.

    Rows without these values are left out.

    Raises:
      RunError: none is kept.
    """
    entries = []
    for row in (row for row in again if set(spot.values) <= row.keys()):
        key = {field: row[field] for field in spot.keys if field in row}
        seeds = [entry for entry in kept if all(entry.get(field) == value for field, value in key.items())]
        same = [entry for entry in seeds if entry.get("seed") == row.get("seed")]
        if not same:
            raise RunError(f"{spot.file} has no row of {key}")
        was, now = ({field: entry[field] for field in spot.values} for entry in (same[-1], row))
        spread = {field: float(np.std([e[field] for e in seeds], ddof=1)) for field in was if len(seeds) > 1}
        commit = same[-1]["machine"]["commit"]
        entry = {"of": key, "kept": was, "again": now, "spread": spread, "kept_commit": commit}
        entries.append(entry | {"holds": {field: holds(was[field], now[field], spread.get(field)) for field in was}})
    return entries


def holds(kept: float, again: float, spread: float | None) -> bool:
    """Whether a value that was measured again is the kept one, but for what seeds differ by."""
    return abs(again - kept) <= (SHARE * abs(kept) if spread is None else SPREADS * spread + 1e-4 * abs(kept))


def table() -> None:
    """Write experiments/tables/spot_checks.md: of each row its last check."""
    last = {(entry["part"], str(entry["of"])): entry for entry in results.read(FILE)}
    head = "| part | row | value | kept | of commit | again | of commit | difference | spread of seeds | holds |"
    lines = [head, "|---" * 10 + "|", *(line for entry in last.values() for line in lines_of(entry))]
    command = "python -m experiments.spot_checks table"
    results.write_table("spot_checks", "Rows measured again", lines, command, "../README.md")


def lines_of(entry: dict[str, Any]) -> list[str]:
    """The table's lines of one row, one for each value."""
    names = [entry["of"][field] for field in ("row", "picture", "way", "what", "recipe") if field in entry["of"]]
    numbers = [f"{field} {entry['of'][field]:g}" for field in ("ratio", "rate") if field in entry["of"]]
    row = ", ".join([*names, *numbers]) or entry["of"]["teacher"]
    lines = []
    for field, kept in entry["kept"].items():
        again, spread = entry["again"][field], entry["spread"].get(field)
        cells = [entry["part"], row, field, f"{kept:.4g}", entry["kept_commit"], f"{again:.4g}"]
        cells += [entry["machine"]["commit"], f"{again - kept:+.2g}", "" if spread is None else f"{spread:.2g}"]
        cells += ["yes" if entry["holds"][field] else "**no**"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
