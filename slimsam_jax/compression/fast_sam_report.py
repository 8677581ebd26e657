"""Reports what a run of a FastSAM cost and kept: errors of the outputs before and after, sizes, agreement of masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimsam_jax.compression.fast_sam_distill import TERMS, errors, recalibrated, wanted_of
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.steps import Distill, Prune
from slimsam_jax.data import Sample
from slimsam_jax.data.reading import map_readable
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation import costs, tables
from slimsam_jax.evaluation.scores import agreement
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.progress import track

GRID = 4  # x 4 points, at which masks are compared


def measure(run: Run, slim: FastSam) -> dict[str, Any]:
    """Measures a slim model on the images to measure on, and those that it came from.

    Returns:
      "teacher", "slim": of each its costs, see `evaluation.costs.measure`, and "masks", how many it detects.
      "errors": of the stages "cut", "recalibrated" and "slim", whichever the run has, {term: the squared error relative
      to the teacher's variance, ..., "mean": of the terms}, mean over images.
      "agreement": mean IoU of the masks of both at a grid of points. "images": how many; "skipped": {name: reason}.

    Raises:
      InputError: not one image could be read.
    """
    stages, teacher = {**stages_of(run), "slim": slim}, run.teacher

    def one(sample: Sample) -> dict[str, Any]:
        wanted, image = wanted_of(teacher, sample), sample.image()
        pairs = [(model, encode_image(model, image)) for model in (teacher, slim)]
        return {
            "errors": {name: errors(model, sample, wanted) for name, model in stages.items()},
            "masks": {name: len(found.scores) for name, (_, found) in zip(("teacher", "slim"), pairs, strict=True)},
            "agreement": float(agreement(pairs, GRID)[1].mean()),
        }

    found, skipped = map_readable(one, track(run.val, "measuring", compiles=True))
    if not found:
        raise InputError(f"no image can be compared on: {next(iter(skipped.values()), 'none was given')}")
    mean = lambda of: float(np.mean([of(each) for each in found.values()]))
    terms = {name: {t: mean(lambda each, at=(name, t): each["errors"][at[0]][at[1]]) for t in TERMS} for name in stages}
    of_models = zip(("teacher", "slim"), costs.measure([teacher, slim]), strict=True)
    return {
        **{name: {**of, "masks": mean(lambda each, name=name: each["masks"][name])} for name, of in of_models},
        "errors": {name: {**of, "mean": float(np.mean(list(of.values())))} for name, of in terms.items()},
        "agreement": mean(lambda each: each["agreement"]),
        "images": len(found),
        "skipped": skipped,
    }


def stages_of(run: Run) -> dict[str, FastSam]:
    """The model as the last cut left it, and with the statistics that the distillation after it began with."""
    cuts = [planned for planned in run.plan if isinstance(planned.step, Prune)]
    if not cuts:
        return {}
    stages = {"cut": run.folder.load_model(cuts[-1].name, "model")}
    following = run.plan[run.plan.index(cuts[-1]) + 1 :][:1]
    for planned in following:
        if isinstance(planned.step, Distill) and planned.step.batch_norm == "recalibrated" and not planned.before:
            stages["recalibrated"] = recalibrated(run, planned, stages["cut"])
    return stages


def print_table(numbers: dict[str, Any]) -> None:
    """Costs of both models, then errors of the slim one as it came to be."""
    costs.print_table(["teacher", "slim"], [numbers["teacher"], numbers["slim"]])
    stages = numbers["errors"]
    rows = [[term, *(f"{stages[stage][term]:.3g}" for stage in stages)] for term in (*TERMS, "mean")]
    tables.print_rows(["error of its variance", *stages], rows)
    masks = (f"{numbers[name]['masks']:.1f}" for name in ("teacher", "slim"))
    print(f"masks an image: {', '.join(masks)}; agreement with the teacher's {100 * numbers['agreement']:.2f} %")
    print(f"peak memory {numbers['peak_memory_gb']:.2f} GB")
    for reason in numbers["skipped"].values():
        print(f"not measured: {reason}")
