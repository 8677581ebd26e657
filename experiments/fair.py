"""Recipes on equal terms, on photographs that neither their tuning nor, where it can be helped, their teacher has seen.

    python -m experiments.fair run --teachers TEACHER NEW --images bsds_train --photos photos --val bsds_val
    python -m experiments.fair run --teachers NEW --steps 24 100 400 1600 --ratios 0.77 --images bsds_train ...
    python -m experiments.fair table

Each recipe of each teacher, ratio and number of steps gets its learning rate by the same rule: from its own, three
times as much or a third, as long as that raises the agreement with the teacher on every fifth photograph of `--images`,
which nothing learns from and no table shows. The best rate is run with the other seeds; `slimsam` also at its own, the
paper's. `--photos` need no annotations. experiments/results/fair.jsonl keeps what is measured; it can be stopped.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import slimsam_jax
from experiments import crossing, distillers, results
from slimsam_jax import checkpoint, cli, data
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import agreement, relative_error, single_mask_iou
from slimsam_jax.inference.decode import Encoded, encode_image
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs

FILE = results.FOLDER / "fair.jsonl"
RECIPES = ("default", "taylor", "slimsam")
TURNS = 5  # at most so often three times up or down
CHOSEN_BY = 5  # every fifth photograph chooses
ROW = ("teacher", "sha256", "data", "ratio", "steps", "images", "photographs")  # what runs of one row share


def run(
    teachers: tuple[Path, ...],
    images: str,
    photos: str,
    val: str,
    ratios: tuple[float, ...] = (0.5, 0.77),
    steps: tuple[int, ...] = (200,),
    recipes: tuple[str, ...] = RECIPES,
    seeds: tuple[int, ...] = (0, 1, 2),
    limit: int = 50,
) -> None:
    """Measure what experiments/results/fair.jsonl does not hold yet.

    Args:
      teachers: SAMs to slim, called by the names of their files.
      images: folder, four fifths to learn from and one to choose learning rates by.
      photos: folder to measure agreement on.
      val: annotated folder to measure agreement and mIoU on.
      ratios: of channels to remove.
      steps: of the optimizer, in all distillations together, 4 images each.
      recipes: names.
      seeds: of images and noise; the first chooses the rate.
      limit: images of `val`.

    Raises:
      InputError: the code is no commit's, or something cannot be read.
    """
    if odd := [count for count in steps if count % 2]:
        raise InputError(f"--steps {odd[0]} is not even: recipes with two distillations take half in each")
    results.check_committed()
    with tempfile.TemporaryDirectory() as folder:
        learned, chosen = divided(data.find([images]), Path(folder))
        sets = {"photos": data.find([photos]), "val": data.find([val])[:limit]}
        for path in teachers:
            bench = Bench(slimsam_jax.load(path), data.find([chosen]), sets)
            where = {"teacher": path, "images": (learned,), "val": (chosen,), "cache": Path(folder) / path.stem}
            key = {"teacher": path.stem, "sha256": checkpoint.sha256(path)}
            key |= {"data": [Path(each).name for each in (images, photos, val)]}
            measure_teacher(bench, key)
            for ratio, count, recipe in itertools.product(ratios, steps, recipes):
                measure(bench, key, distillers.Method(recipe, ratio=ratio), count, sorted(seeds), where)


def measure_teacher(bench: Bench, teacher: dict[str, Any]) -> None:
    """The row of the teacher itself, beside whose mIoU the others stand."""
    method = distillers.Method("teacher", ratio=0.0)
    plan = distillers.Plan(steps=0, chosen_on=len(bench.chosen), measured_on=sum(map(len, bench.sets.values())))
    key = {**teacher, **distillers.key_of("teacher", method, 0, plan, rate=1.0, seed=0)}
    if not results.find(FILE, key):
        results.append(FILE, key | bench.measure(bench.teacher))


def divided(samples: Sequence[data.Sample], folder: Path) -> tuple[str, str]:
    """Copies photographs into two folders: those to learn from, and every fifth, to choose by."""
    for part in ("learn", "choose"):
        (folder / part).mkdir()
    for index, sample in enumerate(samples):
        part = "learn" if index % CHOSEN_BY else "choose"
        for path in (Path(sample.name), Path(sample.name).with_suffix(".json")):
            if path.exists():  # labels are read by none but validations
                shutil.copy(path, folder / part / f"{index}_{path.name}")
    return str(folder / "learn"), str(folder / "choose")


def measure(
    bench: Bench,
    teacher: dict[str, Any],
    method: distillers.Method,
    steps: int,
    seeds: Sequence[int],
    where: dict[str, Any],
) -> None:
    """All runs of a row; `teacher` are the key's fields that say of which teacher and data."""
    bench.methods = {label_of(method): method}
    plan = distillers.Plan(steps=steps, chosen_on=len(bench.chosen), measured_on=sum(map(len, bench.sets.values())))

    def run_of(rate: float, seed: int) -> dict[str, Any]:
        count = len(data.find(where["images"]))
        key = {**teacher, **distillers.key_of(label_of(method), method, count, plan, rate, seed)}
        return distillers.one(bench, key, where)

    best = climbed(lambda rate: run_of(rate, seeds[0])["chosen_by"])
    for rate in dict.fromkeys((best, 1.0) if method.recipe == "slimsam" else (best,)):
        for seed in seeds:
            run_of(rate, seed)


def climbed(score: Callable[[float], float], turns: int = TURNS) -> float:
    """The rate, a power of three, from which neither neighbour is better: from 1 up, or else down."""
    for factor in (3.0, 1 / 3):
        best = climb(score, factor, turns)
        if best != 1.0:
            return best
    return 1.0


def climb(score: Callable[[float], float], factor: float, turns: int) -> float:
    best = 0
    while best < turns and score(factor ** (best + 1)) > score(factor**best):
        best += 1
    return factor**best


def label_of(method: distillers.Method) -> str:
    return f"{method.recipe}, {100 * method.ratio:.0f} %"


class Bench(distillers.Bench):
    """A teacher's side of the measuring, on the photographs that choose and on each set that is reported."""

    def __init__(self, teacher: Sam, chosen: Sequence[data.Sample], sets: dict[str, Sequence[data.Sample]]):
        self.teacher, self.file, self.methods = teacher, FILE, {}
        self.chosen = [self._encoded(sample, False) for sample in chosen]
        self.sets = {name: [self._encoded(each, name == "val") for each in some] for name, some in sets.items()}

    def _encoded(self, sample: data.Sample, annotated: bool) -> tuple[np.ndarray, Any, Encoded]:
        image, truth = read_annotated(sample) if annotated else (sample.image(), None)
        return image, truth, encode_image(self.teacher, image)

    def measure(self, student: Sam) -> dict[str, float]:
        """{"chosen_by": agreement, "photos agreement", "photos error", "val agreement", ..., "val box", ...}."""
        means = {
            f"{name} {score}": value
            for name, some in self.sets.items()
            for score, value in self._means(student, some).items()
        }
        return {
            "chosen_by": self._means(student, self.chosen)["agreement"],
            **means,
            "agreement": means["photos agreement"],
            "point": means["val point"],
            "encoder_parameters": sam_costs.encoder_parameters(student.config),
            "encoder_macs": sam_costs.encoder_macs(student.config).total,
        }

    def _means(self, student: Sam, some: Sequence[tuple[np.ndarray, Any, Encoded]]) -> dict[str, float]:
        scores = [self._of_image(student, *each) for each in some]
        return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}

    def _of_image(self, student: Sam, image: np.ndarray, truth: Any, theirs: Encoded) -> dict[str, float]:
        own = encode_image(student, image)
        of_labels = {name: single_mask_iou(student, own, truth, name) for name in ("point", "box")} if truth else {}
        return {
            "agreement": float(agreement([(self.teacher, theirs), (student, own)], grid=4)[1].mean()),
            "error": relative_error(own.embedding, theirs.embedding),
            **of_labels,
        }


def table() -> None:
    """Write experiments/tables/fair.md, and crossing.md, of several lengths: where lines of error would meet."""
    command = "python -m experiments.fair table"
    if not (entries := results.read(FILE)):
        return
    results.write_table("fair", "Recipes on equal terms", lines_of(entries), command, "../fair.md")
    if len(lines := crossing.lines_of(entries)) > 2:  # more than their head
        results.write_table("crossing", "Error against steps", lines, command, "../fair.md")


def lines_of(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The table's lines, its head first: of each row the chosen rate, of `slimsam` the paper's besides."""
    head = "| teacher | ratio | steps | recipe | agreement, photos | agreement, val | point mIoU, val | box mIoU, val |"
    lines = [head + " error, photos | rate | seeds |", "|---" * 11 + "|"]
    for row, own in sorted(crossing.grouped(entries, *ROW, "recipe").items(), key=order):
        best = crossing.best_rate(own)
        for rate in dict.fromkeys((best, 1.0) if row[-1] == "slimsam" else (best,)):
            called = f"{row[-1]}, the paper's rate" if row[-1] == "slimsam" and rate == 1.0 else row[-1]
            tried = len({e["rate"] for e in own})
            lines.append(line_of((results.called(row[0]), f"{row[3]:g}", str(row[4]), called), own, rate, tried))
    return lines


def order(row: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
    return (*map(str, row[0][:3]), *row[0][3:5], ("teacher", *RECIPES).index(row[0][-1]))


def line_of(cells: Sequence[str], entries: Sequence[dict[str, Any]], rate: float, tried: int) -> str:
    runs = [entry for entry in entries if entry["rate"] == rate]
    whole = [entry for entry in runs if "failed" not in entry]

    def share(name: str) -> str:
        values = 100 * np.array([run[name] for run in whole])
        return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "") if whole else ""

    error = f"{np.mean([run['photos error'] for run in whole]):.2g}" if whole else "not finite"
    count = str(len(runs)) + (f" ({len(runs) - len(whole)} not finite)" if len(whole) < len(runs) else "")
    shares = map(share, ("photos agreement", "val agreement", "val point", "val box"))
    return f"| {' | '.join([*cells, *shares, error, f'{rate:g} of {tried}', count])} |"


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
