"""The paper's tables, and ours, on a SAM that can be measured: prune, distil, measure, row by row (`rows.py`).

    python -m experiments.slimming run --teacher sam_small_256.pth --images bsds_train --val bsds_val
    python -m experiments.slimming table

`run` measures what experiments/results/slimming.jsonl does not hold yet; it can be stopped at any time, and several can
share the work (`--part 0/2`, `--part 1/2`). Every run does what the command of its row does, but for the report:
the teacher's side of the measuring is computed once. `table` writes the rows into experiments/README.md.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import results
from experiments.rows import COMMON, TABLES, Row, plan
from slimsam_jax import cli, metrics
from slimsam_jax.compress import Options
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation import agreement, encode_image, read_annotated, single_mask_iou
from slimsam_jax.models.sam import Sam
from slimsam_jax.run import prepare, slim

FILE = results.FOLDER / "slimming.jsonl"
TEACHER = 0.39307  # point mIoU on bsds_val, by the original code


def run(teacher: Path, images: Path, val: Path, cache: Path = Path("cache"), part: str = "0/1", only: str = "") -> None:
    """Measure what is not measured yet.

    Args:
      teacher: the SAM to slim.
      images: folder to learn from.
      val: annotated folder to measure on; nothing is chosen by it.
      cache: folder for the teacher's embeddings.
      part: i/n: every n-th run, from the i-th.
      only: of this table alone.
    """
    if only not in ("", *TABLES):
        raise InputError(f"--only {only} is no table; there are {', '.join(TABLES)}")
    mine, parts = map(int, part.split("/"))
    bench = None
    tables = [TABLES[only]] if only else TABLES.values()
    wanted = {(row, ratio) for table in tables for ratio in table.ratios for row in table.rows.values()}
    runs = [each for each in plan() if each[:2] in wanted]
    for row, ratio, seed in runs[mine::parts]:
        if results.find(FILE, key := key_of(row, ratio, seed)):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            prepared = prepare(options_of(row, ratio, seed, teacher, images, val, cache, Path(out) / "slim"))
            prepared.cache.fill(prepared.images)
            student = prepared.teacher
            for stage in prepared.stages:
                student = slim(prepared, stage, student)
        bench = bench or Bench(prepared.teacher, prepared.val)
        numbers = bench.measure(student) | {"seconds": time.perf_counter() - start}
        results.append(FILE, key | numbers)
        told = ", ".join(f"{name} {numbers[name]:.4g}" for name in ("error", "point", "box", "agreement", "seconds"))
        print(f"--ratio {ratio} --seed {seed} {row.arguments()}: {told}", flush=True)
        jax.clear_caches()  # the next row's programs are others; those of the decoder lie in the cache on disk


def key_of(row: Row, ratio: float, seed: int) -> dict[str, Any]:
    settings = [*COMMON["set"], *row.set]
    return {**COMMON, **row._asdict(), "set": settings, "ratio": ratio, "seed": seed}


def options_of(
    row: Row, ratio: float, seed: int, teacher: Path, images: Path, val: Path, cache: Path, out: Path
) -> Options:
    """Those of the row's command."""
    given = {**COMMON, **row._asdict(), "set": (*COMMON["set"], *row.set)}
    return Options(
        teacher=teacher, images=(str(images),), val=(str(val),), ratio=ratio, seed=seed, cache=cache, out=out, **given
    )


class Bench:
    """What is measured of a slim model on annotated images, with the teacher's side computed once."""

    def __init__(self, teacher: Sam, val: list[Any]):
        self.teacher = teacher
        self.val = [read_annotated(sample) for sample in val]
        self.wanted = [encode_image(teacher, image) for image, _ in self.val]

    def measure(self, slim: Sam) -> dict[str, float]:
        """Means over images: error of the embedding, mIoU by point and by box, agreement with the teacher; costs."""
        found = []
        for (image, truth), wanted in zip(self.val, self.wanted, strict=True):
            encoded = encode_image(slim, image)
            found.append(
                {
                    "error": metrics.relative_error(encoded.embedding, wanted.embedding),
                    "point": single_mask_iou(slim, encoded, truth, "point"),
                    "box": single_mask_iou(slim, encoded, truth, "box"),
                    "agreement": float(agreement([(self.teacher, wanted), (slim, encoded)], grid=4)[1].mean()),
                }
            )
        macs = metrics.encoder_macs(slim.config)
        return {
            **{name: float(np.mean([each[name] for each in found])) for name in found[0]},
            "encoder_parameters": metrics.encoder_parameters(slim.config),
            "macs_linear": macs.linear,
            "macs_total": macs.total,
        }


def table() -> None:
    """Write the tables into experiments/README.md, and their pictures beside it."""
    from experiments import figures

    found = results.read(FILE)
    for name in TABLES:
        results.write_section(name, "\n".join(lines_of(name, found)))
    figures.draw(lambda row, ratio: runs_of(row, ratio, found), TEACHER)


def runs_of(row: Row, ratio: float, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What has been measured of a row, one entry for each seed."""
    wanted = key_of(row, ratio, 0)
    del wanted["seed"]
    return [entry for entry in found if all(entry.get(key) == value for key, value in wanted.items())]


def lines_of(name: str, found: list[dict[str, Any]]) -> list[str]:
    table = TABLES[name]
    head = ["row", "ratio", "parameters", "MACs", "error", "point mIoU", "box mIoU", "agreement", "seeds"]
    head += (["paper"] if table.paper else []) + ["command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for ratio in table.ratios:
        for label, row in table.rows.items():
            if runs := runs_of(row, ratio, found):
                paper = [f"{table.paper.get((label, ratio), '')}"] if table.paper else []
                cells = [label, f"{ratio:g}", *cells_of(runs), *paper, f"`{row.arguments()}`"]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def cells_of(runs: list[dict[str, Any]]) -> list[str]:
    column = lambda key: np.array([run[key] for run in runs])
    error = column("error")
    share = lambda key: (
        f"{100 * column(key).mean():.2f}" + (f" ± {100 * column(key).std(ddof=1):.2f}" if len(runs) > 1 else "")
    )
    return [
        f"{column('encoder_parameters').mean() / 1e6:.2f} M",
        f"{column('macs_total').mean() / 1e9:.3f} G",
        f"{error.mean():.2g}" + (f" ({error.min():.2g} to {error.max():.2g})" if len(runs) > 1 else ""),
        *map(share, ("point", "box", "agreement")),
        str(len(runs)),
    ]


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
