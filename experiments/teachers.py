"""How much of the default's lead is its teacher's low rank: the same cuts of several teachers, before any distillation.

    python -m experiments.teachers run --teachers TEACHER NEW --images bsds_train --val photos
    python -m experiments.teachers table

Of each teacher the share of the directions of its residual stream that carry 99 and 99.9 % of its variance, and what
`slimsam`, `taylor` and the default lose right after pruning. No labels are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import slimsam_jax
from experiments import crossing, pruning, results
from slimsam_jax import checkpoint, cli, data
from slimsam_jax.compression.calibration_images import calibration_stream, on_devices
from slimsam_jax.compression.projection.statistics import accumulate, moments_of
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.steps import Recipe
from slimsam_jax.evaluation.scores import agreement, relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam
from slimsam_jax.pruning.bases import residual_spectrum

FILE = results.FOLDER / "teachers.jsonl"
SHARES = (0.99, 0.999)
RATIOS = (0.5, 0.77)
MAIN = ("slimsam", "taylor", "default")


def run(teachers: tuple[Path, ...], images: str, val: str, seeds: tuple[int, ...] = pruning.SEEDS) -> None:
    """Measure what experiments/results/teachers.jsonl does not hold yet.

    Args:
      teachers: SAMs of a ViT, called by the names of their files.
      images: folder to take importance and statistics from.
      val: folder of photographs to measure on.
      seeds: of images and noise.
    """
    results.check_committed()
    for path in teachers:
        sam = slimsam_jax.load(path)
        bench = Bench(sam, data.find([images]), data.find([val]))
        of = {"teacher": path.stem, "sha256": checkpoint.sha256(path), "images": Path(images).name}
        keep({**of, "what": "spectrum"}, bench.spectrum)
        for seed, ratio, recipe in itertools.product(seeds, RATIOS, MAIN):
            key = {**of, "what": recipe, "ratio": ratio, "seed": seed, "val": f"{len(bench.val)} of {Path(val).name}"}
            keep(key, bench.pruned, RECIPES[recipe], ratio, seed)


def keep(key: dict[str, Any], measure: Callable[..., dict[str, float]], *arguments: Any) -> None:
    """Measures and keeps, unless it is there."""
    if not results.find(FILE, key):
        numbers = measure(*arguments)
        results.append(FILE, key | numbers)
        print(*key.values(), *(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)


class Bench(pruning.Bench):
    """A teacher, cut as `experiments.pruning` cuts; measured without annotations."""

    def __init__(self, teacher: Sam, images: list[data.Sample], val: list[data.Sample]):
        super().__init__(teacher, images, [])
        self.val = [sample.image() for sample in val]
        self.encoded = [encode_image(teacher, image) for image in self.val]

    def spectrum(self) -> dict[str, float]:
        """{"0.99": share of the directions that carry as much of the stream's variance, ...}."""
        config, step = self.teacher.config, RECIPES["default"][0]
        batches = list(itertools.islice(calibration_stream(step, self.images, config, pruning.BATCH, 0), 25))
        statistic = moments_of(config, ["stream"])
        moment = accumulate(statistic, self.teacher.params["image_encoder"], on_devices(iter(batches), len(batches)))
        carried = np.cumsum(residual_spectrum(np.float64(moment["stream"])))
        return {f"{share:g}": float((1 + (carried < share).sum()) / len(carried)) for share in SHARES}

    def pruned(self, recipe: Recipe, ratio: float, seed: int) -> dict[str, float]:
        """What a recipe's cuts leave."""
        return self.measure(self.prune(recipe, ratio, seed))

    def measure(self, slim: Sam) -> dict[str, float]:
        """The embedding's relative error and the agreement with the teacher, means over photographs."""
        errors, agreements = [], []
        for image, theirs in zip(self.val, self.encoded, strict=True):
            own = encode_image(slim, image)
            errors.append(relative_error(own.embedding, theirs.embedding))
            agreements.append(agreement([(self.teacher, theirs), (slim, own)], grid=4)[1].mean())
        return {"error": float(np.mean(errors)), "agreement": float(np.mean(agreements))}


def table() -> None:
    """Write experiments/tables/teachers.md, once there are rows."""
    if not (entries := results.read(FILE)):
        return
    lines = ["| teacher | directions for 99 %, 99.9 % | ratio | cut by | error | agreement | seeds, photographs |"]
    lines.append("|---" * 7 + "|")
    for entry in (entry for entry in entries if entry["what"] == "spectrum"):
        shares = ", ".join(f"{100 * entry[f'{share:g}']:.0f} %" for share in SHARES)
        begin = f"| {results.called(entry['teacher'])} | {shares} |"
        own = [e for e in entries if "ratio" in e and e["sha256"] == entry["sha256"]]
        rows = crossing.grouped(own, "ratio", "what", "val")
        for ratio, recipe, val in sorted(rows, key=lambda row: (row[2], row[0], MAIN.index(row[1]))):
            runs = rows[ratio, recipe, val]
            lines.append(f"{begin} {ratio:g} | {recipe} | {_cells(runs)} | {len(runs)}, {val} |")
    command = "python -m experiments.teachers table"
    results.write_table("teachers", "Teachers, and what cuts of them lose", lines, command, "../fair.md")


def _cells(runs: list[dict[str, Any]]) -> str:
    errors, agreements = (np.array([run[name] for run in runs]) for name in ("error", "agreement"))
    spread = f" ± {100 * agreements.std(ddof=1):.2f}" if len(runs) > 1 else ""
    return f"{errors.mean():.2g} | {100 * agreements.mean():.2f} %{spread}"


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
