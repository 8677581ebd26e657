"""What single choices give on a SAM that can be measured: prune, distil, measure, row by row (`rows.py`).

    python -m experiments.slimming run --teacher slimsam_jax/assets/sam_small_v2 --images bsds_train --val bsds_val
    python -m experiments.slimming table

`run` measures what experiments/results/slimming.jsonl does not hold yet; it can be stopped at any time, and several can
share the work (`--seeds 0`, `--seeds 1`). Every run does what the command of its row does, but for the report: the
teacher's side of the measuring is computed once. `table` writes the rows into experiments/tables/.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.from_torch import load
from experiments import results
from experiments.recipes import is_augmented
from experiments.rows import COMMON, RATIO, SEEDS, TABLES, Row, rows
from slimsam_jax import checkpoint, cli
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.pipeline import carry_out
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import agreement, relative_error, single_mask_iou
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs

FILE = results.FOLDER / "slimming.jsonl"


def run(
    teacher: Path,
    images: Path,
    val: Path,
    cache: Path = Path("cache"),
    seeds: tuple[int, ...] = SEEDS,
    only: tuple[str, ...] = (),
) -> None:
    """Measure what is not measured yet.

    Args:
      teacher: the SAM to slim, called by the name of its file or folder.
      images: folder to learn from.
      val: annotated folder to measure on; nothing is chosen by it.
      cache: folder for the teacher's embeddings.
      seeds: of images and noise.
      only: these rows alone, by their labels in the tables.

    Raises:
      InputError: the code is no commit's, or no table has a row of that label.
    """
    chosen = chosen_rows(only)
    results.check_committed()
    of_teacher = {"teacher": teacher.stem, "sha256": checkpoint.sha256(teacher)}
    bench = None
    for seed, row in itertools.product(seeds, chosen):
        key = {**of_teacher, **key_of(row, seed)}
        if results.find(FILE, key):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            options = options_of(row, seed, teacher, images, val, cache, Path(out) / "slim")
            prepared = prepare(options, load(options.teacher), row.steps_of())
            with prepared.folder:
                student, _ = carry_out(prepared)
        seconds = time.perf_counter() - start
        bench = bench or Bench(prepared.teacher, prepared.val)
        numbers = bench.measure(student) | {"seconds": seconds}
        results.append(FILE, key | numbers)
        shown = ", ".join(f"{name} {numbers[name]:.4g}" for name in ("error", "point", "box", "agreement", "seconds"))
        print(f"--seed {seed} {row.arguments()}: {shown}", flush=True)
        jax.clear_caches()  # the next row's programs are others; those of the decoder lie in the cache on disk


def chosen_rows(only: Sequence[str]) -> list[Row]:
    """Returns the rows of these labels, all of them by default.

    Raises:
      InputError: a label is unknown.
    """
    labels = {label: row for table in TABLES.values() for label, row in table.rows.items()}
    if unknown := [label for label in only if label not in labels]:
        raise InputError(f"--only {unknown[0]!r} is no row; there are {', '.join(labels)}")
    return list(dict.fromkeys(labels[label] for label in only)) if only else list(rows())


def key_of(row: Row, seed: int) -> dict[str, Any]:
    return {"recipe": row.recipe, "set": row.settings(), **COMMON, "ratio": RATIO, "seed": seed}


def options_of(row: Row, seed: int, teacher: Path, images: Path, val: Path, cache: Path | None, out: Path) -> Options:
    """Returns the options of the row's command."""
    if is_augmented(row.steps_of()):
        cache = None  # it holds embeddings of images as they are
    given = {"recipe": row.recipe, "set": tuple(row.settings()), **COMMON, "ratio": RATIO, "seed": seed}
    return Options(teacher=teacher, images=(str(images),), val=(str(val),), cache=cache, out=out, **given)


class Bench:
    """What is measured of a slim model on annotated images, with the teacher's side computed once."""

    def __init__(self, teacher: Sam, val: list[Any]):
        self.teacher = teacher
        self.val = [read_annotated(sample) for sample in val]
        self.encoded = [encode_image(teacher, image) for image, _ in self.val]

    def measure(self, slim: Sam) -> dict[str, float]:
        """Measures means over images: embedding's error, mIoU by point and box, agreement with the teacher; costs."""
        scores = [self._of_image(slim, *pair) for pair in zip(self.val, self.encoded, strict=True)]
        return {
            **{name: float(np.mean([image[name] for image in scores])) for name in scores[0]},
            "encoder_parameters": sam_costs.encoder_parameters(slim.config),
            "macs_total": sam_costs.encoder_macs(slim.config).total,
        }

    def _of_image(self, slim: Sam, annotated: Any, teachers: Any) -> dict[str, float]:
        image, truth = annotated
        encoded = encode_image(slim, image)
        return {
            "error": relative_error(encoded.embedding, teachers.embedding),
            "point": single_mask_iou(slim, encoded, truth, "point"),
            "box": single_mask_iou(slim, encoded, truth, "box"),
            "agreement": float(agreement([(self.teacher, teachers), (slim, encoded)], grid=4)[1].mean()),
        }


def table() -> None:
    """Write the tables into experiments/tables/."""
    entries = results.read(FILE)
    for name in (name for name in TABLES if len(lines_of(name, entries)) > 2):  # more than their head
        command = "python -m experiments.slimming table"
        results.write_table(name, TABLES[name].title, lines_of(name, entries), command, "../slimming.md")


def lines_of(name: str, entries: list[dict[str, Any]]) -> list[str]:
    """The table's lines, its head first: rows that have been measured, once for each teacher."""
    table = TABLES[name]
    paper = ["paper"] if table.paper else []
    lines = [f"| {' | '.join(['teacher', 'row', *COLUMNS, 'seeds', *paper, 'command'])} |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for teacher in dict.fromkeys(entry["teacher"] for entry in entries):
        own = [entry for entry in entries if entry["teacher"] == teacher]
        for label, row in table.rows.items():
            if runs := runs_of(row, own):
                cells = [results.called(teacher), label, *(cell(runs) for cell in COLUMNS.values()), str(len(runs))]
                cells += [str(table.paper.get(label, ""))] if paper else []
                lines.append(f"| {' | '.join([*cells, f'`{row.arguments()}`'])} |")
    return lines


def runs_of(row: Row, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the entries of a row, one for each seed."""
    key = key_of(row, 0)
    del key["seed"]
    return [entry for entry in entries if all(entry.get(name) == value for name, value in key.items())]


def _share(key: str) -> Callable[[list[dict[str, Any]]], str]:
    """Computes mean and standard deviation over the runs, in %."""

    def cell(runs: list[dict[str, Any]]) -> str:
        values = 100 * np.array([run[key] for run in runs])
        return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")

    return cell


def _error(runs: list[dict[str, Any]]) -> str:
    values = np.array([run["error"] for run in runs])
    return f"{values.mean():.2g}" + (f" ({values.min():.2g} to {values.max():.2g})" if len(runs) > 1 else "")


def _mean(key: str, unit: float, text: str) -> Callable[[list[dict[str, Any]]], str]:
    return lambda runs: text.format(np.mean([run[key] for run in runs]) / unit)


COLUMNS = {
    "parameters": _mean("encoder_parameters", 1e6, "{:.2f} M"),
    "MACs": _mean("macs_total", 1e9, "{:.3f} G"),
    "error": _error,
    "point mIoU": _share("point"),
    "box mIoU": _share("box"),
    "agreement": _share("agreement"),
}


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
