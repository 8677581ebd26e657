"""The paper's tables, and ours, on a SAM that can be measured: prune, distil, measure, row by row (`rows.py`).

    python -m experiments.slimming run --only choices --teacher slimsam_jax/assets/sam_small_v2 --images bsds_train \\
      --val bsds_val
    python -m experiments.slimming run --teacher sam_small_256.pth --images bsds_train --val bsds_val    # the archive
    python -m experiments.slimming table

`run` measures what experiments/results/slimming.jsonl does not hold yet; it can be stopped at any time, and several can
share the work (`--part 0/2`, `--part 1/2`). Every run does what the command of its row does, but for the report:
the teacher's side of the measuring is computed once. `table` writes the rows into experiments/tables/.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.from_torch import load
from experiments import results
from experiments.old_results import slimming_key
from experiments.recipes import is_augmented
from experiments.rows import COMMON, SEEDS, TABLES, Row, plan
from slimsam_jax import checkpoint, cli
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.pipeline import carry_out
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.clicks import click_scores
from slimsam_jax.evaluation.scores import agreement, relative_error, single_mask_iou
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs
from slimsam_jax.profiling.latency import encoder_runner, interleaved

FILE = results.FOLDER / "slimming.jsonl"
PROGRAM = "python -m experiments.slimming"
CLICKS, CLICKED = 5, 30  # clicks on each object of so many images
TEACHER = 0.39307  # point mIoU on bsds_val, by the original code


def run(
    teacher: Path,
    images: Path,
    val: Path,
    cache: Path = Path("cache"),
    part: str = "0/1",
    only: str = "",
    seeds: tuple[int, ...] = SEEDS,
) -> None:
    """Measure what is not measured yet.

    Args:
      teacher: the SAM to slim.
      images: folder to learn from.
      val: annotated folder to measure on; nothing is chosen by it.
      cache: folder for the teacher's embeddings.
      part: i/n: every n-th run, from the i-th.
      only: of this table alone.
      seeds: of these seeds alone.
    """
    if only not in ("", *TABLES):
        raise InputError(f"--only {only} is no table; there are {', '.join(TABLES)}")
    results.check_committed()
    mine, parts = map(int, part.split("/"))
    bench = None
    name = TABLES[only].teacher if only else "small"
    check_teacher(teacher, name)
    tables = [TABLES[only]] if only else [table for table in TABLES.values() if table.teacher == name]
    chosen = {(row, ratio) for table in tables for ratio in table.ratios for row in table.rows.values()}
    runs = [(row, ratio, seed) for row, ratio, seed in plan() if (row, ratio) in chosen and seed in seeds]
    for row, ratio, seed in runs[mine::parts]:
        if matching(key := key_of(row, ratio, seed, name)):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            options = options_of(row, ratio, seed, teacher, images, val, cache, Path(out) / "slim")
            prepared = prepare(options, load(options.teacher), row.steps_of(ratio))
            with prepared.folder:
                student, _ = carry_out(prepared)
        seconds = time.perf_counter() - start
        bench = bench or Bench(prepared.teacher, prepared.val)
        more = any(t.more and t.teacher == name and row in t.rows.values() for t in TABLES.values())
        if not matching(uncut(name)):  # its digest, too, which `check_teacher` holds others against
            results.append(
                FILE, uncut(name) | bench.measure(prepared.teacher, more) | {"sha256": checkpoint.sha256(teacher)}
            )
        numbers = bench.measure(student, more) | {"seconds": seconds}
        results.append(FILE, key | numbers)
        shown = ", ".join(f"{name} {numbers[name]:.4g}" for name in ("error", "point", "box", "agreement", "seconds"))
        print(f"--ratio {ratio} --seed {seed} {row.arguments()}: {shown}", flush=True)
        jax.clear_caches()  # the next row's programs are others; those of the decoder lie in the cache on disk


def key_of(row: Row, ratio: float, seed: int, teacher: str = "small") -> dict[str, Any]:
    settings = [*COMMON["set"], *row.set]
    return {"teacher": teacher, **COMMON, **row._asdict(), "set": settings, "ratio": ratio, "seed": seed}


def matching(key: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the entries under a key, also by the names of version 0.2."""
    entries = map(slimming_key, results.read(FILE))
    return [entry for entry in entries if all(entry.get(name) == value for name, value in key.items())]


def uncut(teacher: str) -> dict[str, Any]:
    """Returns the key of the teacher itself."""
    return {"teacher": teacher, "recipe": "none", "ratio": 0.0}


def options_of(
    row: Row, ratio: float, seed: int, teacher: Path, images: Path, val: Path, cache: Path | None, out: Path
) -> Options:
    """Returns the options of the row's command."""
    given = {**COMMON, **row._asdict(), "set": (*COMMON["set"], *row.set)}
    if is_augmented(row.steps_of(ratio)):
        cache = None  # it holds embeddings of images as they are
    return Options(
        teacher=teacher, images=(str(images),), val=(str(val),), ratio=ratio, seed=seed, cache=cache, out=out, **given
    )


def check_teacher(path: Path, name: str) -> None:
    """Raises InputError if other results of that name are another teacher's."""
    known = matching(uncut(name))
    if known and known[0]["sha256"] != checkpoint.sha256(path):
        raise InputError(f"{path} is not the teacher that {FILE.name} calls {name}")


class Bench:
    """What is measured of a slim model on annotated images, with the teacher's side computed once."""

    def __init__(self, teacher: Sam, val: list[Any]):
        self.teacher = teacher
        self.val = [read_annotated(sample) for sample in val]
        self.encoded = [encode_image(teacher, image) for image, _ in self.val]

    def measure(self, slim: Sam, more: bool = False) -> dict[str, float]:
        """Measures means over images: embedding's error, mIoU by point and box, agreement with the teacher; costs.

        Args:
          more: and mIoU after `CLICKS` clicks, on the first `CLICKED` images.
        """
        scores = [
            self._of_image(slim, annotated, encoded, clicks=more and i < CLICKED)
            for i, (annotated, encoded) in enumerate(zip(self.val, self.encoded, strict=True))
        ]
        macs = sam_costs.encoder_macs(slim.config)
        runs = [encoder_runner(sam.config, sam.params) for sam in (self.teacher, slim)]
        teacher, own = interleaved(runs)
        return {
            **{name: float(np.mean([image[name] for image in scores if name in image])) for name in scores[0]},
            "encoder_parameters": sam_costs.encoder_parameters(slim.config),
            "macs_linear": macs.linear,
            "macs_total": macs.total,
            "speedup": teacher / own,
        }

    def _of_image(self, slim: Sam, annotated: Any, teachers: Any, clicks: bool) -> dict[str, float]:
        image, truth = annotated
        encoded = encode_image(slim, image)
        scores = {
            "error": relative_error(encoded.embedding, teachers.embedding),
            "point": single_mask_iou(slim, encoded, truth, "point"),
            "box": single_mask_iou(slim, encoded, truth, "box"),
            "agreement": float(agreement([(self.teacher, teachers), (slim, encoded)], grid=4)[1].mean()),
        }
        return scores | ({"clicks": click_scores(slim, encoded, truth, CLICKS)[f"iou_{CLICKS}"]} if clicks else {})


def table() -> None:
    """Write the tables into experiments/tables/, and their figures into experiments/figures/."""
    from experiments import figures

    entries = [slimming_key(entry) for entry in results.read(FILE)]
    for name in (name for name in TABLES if len(lines_of(name, entries)) > 2):
        results.write_table(name, TABLES[name].title, lines_of(name, entries), f"{PROGRAM} table", "../slimming.md")
    figures.draw(lambda row, ratio: runs_of(row, ratio, entries), TEACHER)


def runs_of(row: Row, ratio: float, entries: list[dict[str, Any]], teacher: str = "small") -> list[dict[str, Any]]:
    """Returns the entries of a row, one for each seed."""
    key = key_of(row, ratio, 0, teacher)
    del key["seed"]
    return [entry for entry in entries if all(entry.get(name) == value for name, value in key.items())]


def lines_of(name: str, entries: list[dict[str, Any]]) -> list[str]:
    table = TABLES[name]
    more = MORE if table.more else ()
    head = ["row", "ratio", *COLUMNS, *more, "seeds", *(["paper"] if table.paper else []), "command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    whole = [entry for entry in entries if more and uncut(table.teacher).items() <= entry.items()]
    rows = [("the teacher", 0.0, None, whole)] if whole else []
    rows += [
        (label, ratio, row, runs_of(row, ratio, entries, table.teacher))
        for ratio in table.ratios
        for label, row in table.rows.items()
    ]
    for label, ratio, row, runs in rows:
        if runs:
            paper = [f"{table.paper.get((label, ratio), '')}"] if table.paper else []
            cells = [COLUMNS[column](runs) for column in COLUMNS] + [MORE[column](runs) for column in more]
            command = f"`{row.arguments()}`" if row else ""
            seeds = f"{len(runs) if row else ''}{results.mark(runs)}"
            lines.append("| " + " | ".join([label, f"{ratio:g}", *cells, seeds, *paper, command]) + " |")
    return lines


def _share(key: str) -> Callable[[list[dict[str, Any]]], str]:
    """Computes mean and standard deviation over the runs that have it, in %."""

    def cell(runs: list[dict[str, Any]]) -> str:
        values = 100 * np.array([run[key] for run in runs if key in run])
        spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
        return f"{values.mean():.2f}{spread}" if len(values) else ""

    return cell


def _error(runs: list[dict[str, Any]]) -> str:
    values = np.array([run["error"] for run in runs])
    return f"{values.mean():.2g}" + (f" ({values.min():.2g} to {values.max():.2g})" if len(runs) > 1 else "")


def _speedup(runs: list[dict[str, Any]]) -> str:
    values = [run["speedup"] for run in runs if "speedup" in run]
    return f"{np.median(values):.1f}" if values else ""


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
MORE = {
    "linear MACs": _mean("macs_linear", 1e9, "{:.3f} G"),
    f"{CLICKS} clicks": _share("clicks"),
    "times as fast": _speedup,
}


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
