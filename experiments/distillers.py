"""One teacher into students of about equal size by each recipe, of few images: does slimming need fewer of them?

    python -m experiments.distillers run --teacher slimsam_jax/assets/sam_small_v2 --images bsds_train --val bsds_val
    python -m experiments.distillers run --quick --teacher TEACHER --images bsds_train --val bsds_val
    python -m experiments.distillers table

Each row takes as many optimizer steps of 4 images, whatever its recipe. It is run at a third of the recipe's own
learning rates, at these, and at three times as much; the first photographs of `--val` choose, by agreement with the
teacher, and the others are measured on. The chosen rate is run with the other seeds. Only what
experiments/results/distillers.jsonl does not hold yet is measured, and only by committed code.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from converters.from_torch import load
from experiments import results
from slimsam_jax import cli, data
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.pipeline import carry_out
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import DistillMasks, Recipe
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.evaluation.scores import agreement, relative_error, single_mask_iou
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs

FILE = results.FOLDER / "distillers.jsonl"
BATCH = 4
RATES = (1 / 3, 1.0, 3.0)  # times the recipe's own
ONCE = ("distill.validations=1", "distill.keep_checkpoint=last")


class Method(NamedTuple):
    """A recipe with what it is run on.

    Attributes:
      student: a preset, of recipes that distil into another encoder.
      ratio: share of the channels to remove, of those that cut.
      weights: of terms of the last training by masks, (name, weight), in the place of the recipe's.
    """

    recipe: str
    student: str | None = None
    ratio: float | None = None
    weights: tuple[tuple[str, float], ...] = ()

    def steps_of(self, rate: float) -> Recipe:
        """The recipe at so many times its own learning rates."""
        return tuple(self._changed(step, rate) for step in change(RECIPES[self.recipe], ONCE))

    def _changed(self, step: Any, rate: float) -> Any:
        if not hasattr(step, "optimizer"):
            return step
        own = step.optimizer
        faster = {"auto_lr": own.auto_lr * rate} if own.lr == "auto" else {"lr": own.lr * rate}
        step = dataclasses.replace(step, optimizer=dataclasses.replace(own, **faster))
        if self.weights and isinstance(step, DistillMasks):
            step = dataclasses.replace(step, losses=dataclasses.replace(step.losses, **dict(self.weights)))
        return step


STUDENTS = ("tiny_vit_small", "rep_vit_small", "vit_small")  # 0.8 M parameters each, as the teacher cut by 77 %
SLIMMED = {
    f"{recipe}, {100 * ratio:.0f} %": Method(recipe, ratio=ratio)
    for ratio in (0.77, 0.9)
    for recipe in ("default", "slimsam")
}
DISTILLED = {
    f"{recipe}, {student}": Method(recipe, student)
    for student in STUDENTS
    for recipe in ("mobile_sam", "edge_sam", "tiny_sam")
}
TERMS = ("embedding", "tokens", "outputs")  # TinySAM's alpha, beta and gamma
SENSITIVITY = {
    f"tiny_sam, {term} {weight:g}": Method("tiny_sam", "tiny_vit_small", weights=((term, weight),))
    for term in TERMS
    for weight in (0.0, 3.0)
}
METHODS = {**SLIMMED, **DISTILLED, **SENSITIVITY}
TABLES = {"methods": {**SLIMMED, **DISTILLED}, "weights": {"tiny_sam, tiny_vit_small": None, **SENSITIVITY}}
# Of the first table what is run unless rows are named: each recipe, and each student, at least once.
CHOSEN = (
    *("default, 77 %", "mobile_sam, tiny_vit_small", "slimsam, 77 %", "mobile_sam, vit_small"),
    *("tiny_sam, tiny_vit_small", "edge_sam, rep_vit_small", "mobile_sam, rep_vit_small"),
)


class Plan(NamedTuple):
    """How much is run: {images to learn from}, optimizer steps, rates, seeds, photographs to choose and to measure."""

    images: tuple[int, ...] = (30, 200)
    steps: int = 300
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = (0, 1, 2)
    chosen_on: int = 20
    measured_on: int = 80


QUICK = Plan((30,), 40, (1.0,), (0,), 4, 16)


def run(
    teacher: Path,
    images: str,
    val: str,
    cache: Path = Path("cache"),
    table: Literal["methods", "weights"] = "methods",
    only: tuple[str, ...] = (),
    quick: bool = False,
    limits: tuple[int, ...] = Plan().images,
    steps: int = Plan().steps,
    seeds: tuple[int, ...] = Plan().seeds,
    rates: tuple[float, ...] = RATES,
) -> None:
    """Measure what is not measured yet, and add it to experiments/results/distillers.jsonl.

    Args:
      teacher: the SAM that all learn from, called by the name of its file or folder.
      images: annotated folder to learn from.
      val: annotated folder of 100 photographs: 20 to choose learning rates by, 80 to measure on.
      cache: folder for the teacher's embeddings.
      table: "weights" are those of tiny_sam's three terms, of 30 images.
      only: these rows, by their names in the table; default: seven of the methods, all weights.
      quick: few steps of 30 images, at the recipe's own rates, one seed, 20 photographs: ten minutes of one core.
      limits: of --images, how many to learn from.
      steps: of the optimizer, in all.
      seeds: of weights, images and prompts.
      rates: times the recipe's own learning rates, the first seed's; the best is run with the other seeds.
    """
    if unknown := set(only) - set(TABLES[table]):
        raise InputError(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(TABLES[table])}")
    results.check_committed()
    plan = QUICK if quick else Plan(limits if table == "methods" else limits[:1], steps, rates, seeds)
    bench = Bench(load(teacher), data.find([val]), plan)
    rows = only or (CHOSEN if table == "methods" else tuple(TABLES[table]))
    with tempfile.TemporaryDirectory() as folder:
        where = {"teacher": teacher, "images": (images,), "val": (bench.copied(Path(folder)),), "cache": cache}
        for count in plan.images:
            for label in rows:
                measure(bench, label, count, plan, where)


def measure(bench: Bench, label: str, count: int, plan: Plan, where: dict[str, Any]) -> None:
    """All runs of a row: each rate with the first seed, the best with the others."""
    first, *others = plan.seeds

    def run_of(rate: float, seed: int) -> dict[str, Any]:
        key = {"teacher": where["teacher"].stem, **key_of(label, bench.methods[label], count, plan, rate, seed)}
        return one(bench, key, where)

    best = max((run_of(rate, first) for rate in plan.rates), key=lambda entry: entry["chosen_by"])
    for seed in others:
        run_of(best["rate"], seed)


def key_of(label: str, method: Method, count: int, plan: Plan, rate: float, seed: int) -> dict[str, Any]:
    photographs = [plan.chosen_on, plan.measured_on]
    run = {"images": count, "steps": plan.steps, "rate": round(rate, 4), "seed": seed, "photographs": photographs}
    return {"row": label, **method._asdict(), "weights": dict(method.weights), **run}


def one(bench: Bench, key: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The entry of a run, which is made if there is none. A run whose loss is not finite has the worst scores."""
    if known := results.find(bench.file, key):
        return known[0]
    method, start = bench.methods[key["row"]], time.process_time()
    rate = next(rate for rate in (*RATES, key["rate"]) if round(rate, 4) == key["rate"])
    with tempfile.TemporaryDirectory() as out:
        student = Path(method.student) if method.student else None
        how = {"steps": key["steps"] // 2, "limit": key["images"], "seed": key["seed"], "batch": BATCH}
        options = Options(**where, **how, ratio=method.ratio, student=student, out=Path(out) / "run")
        prepared = prepare(options, bench.teacher, method.steps_of(rate))
        try:
            with prepared.folder:
                numbers = bench.measure(carry_out(prepared)[0])
        except RunError as error:
            if "finite" not in str(error):
                raise
            numbers = {"chosen_by": 0.0, "agreement": 0.0, "point": 0.0, "failed": str(error)[:200]}
    entry = {**key, **numbers, "cpu_seconds": round(time.process_time() - start, 1)}
    results.append(bench.file, entry)
    shown = ", ".join(f"{name} {entry[name]:.4g}" for name in ("chosen_by", "agreement", "point", "cpu_seconds"))
    print(f"{key['row']}, {key['images']} images, rate {key['rate']}, seed {key['seed']}: {shown}", flush=True)
    jax.clear_caches()  # the next row's programs are others
    return entry


class Bench:
    """What is measured of a student, with the teacher's side computed once.

    Args:
      methods: rows by their labels.
      file: that holds what was measured.
    """

    def __init__(
        self,
        teacher: Sam,
        samples: Sequence[data.Sample],
        plan: Plan,
        methods: Mapping[str, Method] = METHODS,
        file: Path = FILE,
    ):
        self.teacher, self.chosen_on, self.methods, self.file = teacher, plan.chosen_on, methods, file
        self.samples = list(samples[: plan.chosen_on + plan.measured_on])
        if len(self.samples) < plan.chosen_on + plan.measured_on:
            raise InputError(f"--val has {len(samples)} images, and {plan.chosen_on + plan.measured_on} are asked for")
        self.read = [read_annotated(sample) for sample in self.samples]
        self.encoded = [encode_image(teacher, image) for image, _ in self.read]

    def copied(self, folder: Path) -> str:
        """The photographs that rates are chosen by, in a folder of their own, for what a run wants to validate on."""
        for sample in self.samples[: self.chosen_on]:
            for path in (Path(sample.name), Path(sample.name).with_suffix(".json")):
                shutil.copy(path, folder / path.name)
        return str(folder)

    def measure(self, student: Sam) -> dict[str, float]:
        """Means over the photographs to measure on; "chosen_by" is the agreement on the others."""
        scores = [self._of(student, *each) for each in zip(self.read, self.encoded, strict=True)]
        mean = lambda name, some: float(np.mean([score[name] for score in some]))
        rest = scores[self.chosen_on :]
        return {
            "chosen_by": mean("agreement", scores[: self.chosen_on]),
            **{name: mean(name, rest) for name in scores[0]},
            "encoder_parameters": sam_costs.encoder_parameters(student.config),
            "encoder_macs": sam_costs.encoder_macs(student.config).total,
        }

    def _of(self, student: Sam, annotated: Any, theirs: Any) -> dict[str, float]:
        image, truth = annotated
        own = encode_image(student, image)
        return {
            "agreement": float(agreement([(self.teacher, theirs), (student, own)], grid=4)[1].mean()),
            "point": single_mask_iou(student, own, truth, "point"),
            "error": relative_error(own.embedding, theirs.embedding),
        }


def table() -> None:
    """Write experiments/tables/distillers.md: of each row and number of images the chosen rate, over seeds."""
    made = (lines_of(results.read(FILE), METHODS), "python -m experiments.distillers table", "../distillers.md")
    results.write_table("distillers", "Distilled or slimmed, of few images", *made)


def lines_of(entries: Sequence[dict[str, Any]], methods: Iterable[str]) -> list[str]:
    """The table's lines, its head first."""
    head = "| row | images | steps | parameters | MACs | agreement | point mIoU | error | rate | seeds, photographs |"
    lines = [head, "|---" * 10 + "|"]
    runs = dict.fromkeys((e["images"], e["steps"], tuple(e["photographs"])) for e in entries)
    for images, steps, photographs in sorted(runs):
        own = [e for e in entries if (e["images"], e["steps"], tuple(e["photographs"])) == (images, steps, photographs)]
        for label in methods:
            if row := [entry for entry in own if entry["row"] == label]:
                lines.append(line_of(label, row))
    return lines


def line_of(label: str, entries: Sequence[dict[str, Any]]) -> str:
    """The line of a row's entries of one number of images: of the rate that was chosen with the first seed.

    Means are over the seeds whose loss stayed finite; how many did not stands beside their number.
    """
    first = min(entry["seed"] for entry in entries)
    tuned = [entry for entry in entries if entry["seed"] == first]
    best = max(tuned, key=lambda entry: entry["chosen_by"])
    runs = [entry for entry in entries if entry["rate"] == best["rate"]]
    whole = [entry for entry in runs if "failed" not in entry]

    def share(name: str) -> str:
        values = 100 * np.array([run[name] for run in whole])
        return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")

    cells = ["", "", "not finite", "", ""]
    if "failed" not in best:
        size = [f"{best['encoder_parameters'] / 1e6:.2f} M", f"{best['encoder_macs'] / 1e9:.2f} G"]
        cells = [*size, share("agreement"), share("point"), f"{np.mean([run['error'] for run in whole]):.2g}"]
    rate = f"{best['rate']:g} of {len(tuned)}"
    seeds = str(len(runs)) + (f" ({len(runs) - len(whole)} not finite)" if len(whole) < len(runs) else "")
    row = [label, str(best["images"]), str(best["steps"]), *cells, rate, f"{seeds}, {best['photographs'][1]}"]
    return f"| {' | '.join(row)} |"


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
