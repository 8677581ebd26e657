"""A compression run of a FastSAM: its recipe, what it refuses, its two steps, and its report.

`pipeline` takes the steps, and saves and resumes them, as those of any run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from slimsam_jax import checkpoint
from slimsam_jax.compression import fast_sam, fast_sam_report
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.fast_sam_distill import distill, validator_of
from slimsam_jax.compression.pipeline import StepFunction, carry_out, name_skipped, save_other, say_what_to_do
from slimsam_jax.compression.plan import Planned, check
from slimsam_jax.compression.prepare import find_images, run_of
from slimsam_jax.compression.recipes.fast_sam import RECIPE
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.set_option import settled
from slimsam_jax.compression.steps import Augment, Distill, Optimizer, Prune, Recipe, Validation
from slimsam_jax.data.batches import Batches
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import write_json
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.profiling.memory import peak_memory
from slimsam_jax.progress import track
from slimsam_jax.training import preemption
from slimsam_jax.training.setup import batch_size, too_many_of_val

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options

REFUSED = (
    "budget",
    "student",
    "uniform",
    "cache",
    "attention",
    "distributed",
)  # options that say something of SAM's encoders
_names = lambda *records: {field.name for record in records for field in dataclasses.fields(record)}
READ = {  # the choices that mean something; all others stay as the recipe has them
    Prune: {"ratio", "criterion", "allocation", "round_to", "min_keep"},
    Distill: {"relative", "order", "batch_norm", *_names(Optimizer, Augment, Validation)},
}


def run(options: Options, teacher: FastSam, recipe: Recipe | None = None, student: None = None) -> dict[str, Any]:
    """As `pipeline.run`; a student is refused by its option."""
    run = prepare(options, teacher, recipe)
    with run.folder, preemption.at_once("finished steps are kept: continue with --resume"):
        student, seconds = carry_out(run, STEP_FUNCTIONS)
        numbers = finish(run, student, seconds)
    if complaint := too_many_of_val(options, run.images, run.val, numbers["skipped"]):
        raise RunError(f"{options.out} is finished, and measured on the rest; but {complaint}")
    return numbers


def prepare(options: Options, teacher: FastSam, recipe: Recipe | None = None) -> Run:
    """As `prepare.prepare`: everything that can be refused is refused here, before anything is written."""
    batch, own = batch_size(options), recipe is not None
    check_options(options, own)
    recipe = recipe if own else settled(recipe_of(teacher), options.set)
    check(recipe)
    check_steps(recipe, teacher)
    target = Target(options.channel_ratio(), None)
    return run_of(options, recipe, target, teacher, find_images(options, batch), batch, own, validator_of)


def recipe_of(teacher: FastSam) -> Recipe:
    """`RECIPE`; where batch norms are folded already nothing is recalibrated."""
    if teacher.config.batch_norm:
        return RECIPE
    return tuple(dataclasses.replace(s, batch_norm="frozen") if isinstance(s, Distill) else s for s in RECIPE)


def check_options(options: Options, own: bool) -> None:
    """Raises InputError for options that a FastSAM does not have."""
    for field in dataclasses.fields(options):
        if field.name in REFUSED and getattr(options, field.name) != field.default:
            raise InputError(f"--{field.name} is for SAMs, and the teacher is a FastSAM: leave it out")
    if options.recipe not in ("default", "taylor") and not own:
        raise InputError(f"recipe {options.recipe} is of SAM's encoders, and the teacher is a FastSAM: leave it out")


def check_steps(recipe: Recipe, teacher: FastSam) -> None:
    """Raises InputError for steps and choices that a FastSAM does not have."""
    usual = {type(step): dict(_flat(step)) for step in RECIPE}
    for step in recipe:
        if type(step) not in usual or getattr(step, "part", "all") != "all":
            raise InputError("a FastSAM's recipe has steps Prune('all', ...) and Distill('none', ...) alone")
        kind = type(step).__name__.lower()
        for name, value in _flat(step):
            if name not in READ[type(step)] and value != usual[type(step)][name]:
                raise InputError(f"{kind}.{name} is of SAM's encoders, and the teacher is a FastSAM: leave it out")
        if isinstance(step, Prune) and step.criterion == "projection":
            raise InputError("a FastSAM's channels have no projection: prune.criterion=taylor, fisher or magnitude")
        if isinstance(step, Prune) and step.allocation in ("macs", "params"):
            raise InputError("a FastSAM's channels compete globally or locally: set prune.allocation=global")
        if getattr(step, "batch_norm", "frozen") != "frozen" and not teacher.config.batch_norm:
            raise InputError("this FastSAM's batch norms are folded: leave distill.batch_norm out")


def _flat(step: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the fields of a record, and of the records in it."""
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        yield from _flat(value) if dataclasses.is_dataclass(value) else [(field.name, value)]


def prune_step(run: Run, planned: Planned, student: FastSam, previous: FastSam) -> FastSam:
    """The step `Prune`, on images of the run if its criterion reads any."""
    options, step, frame = run.options, planned.step, fast_sam.Square(student.config.image_size)
    count = min(options.importance_images, len(run.images)) if step.reads_gradients else 0
    limit = options.broken_share()
    batches = Batches(run.images, frame.size, 1, options.seed, max_broken=limit, frame=frame)
    images = (batch["image"][0] for batch in itertools.islice(batches, count))
    slim = fast_sam.prune(
        student,
        step.ratio or run.target.ratio,
        step.criterion,
        track(images, f"{planned.name}: gradients", count, compiles=True) if count else (),
        step.allocation,
        step.round_to,
        step.min_keep * (1 - (step.ratio or run.target.ratio)),
        options.seed,
    )
    batches.close()
    if not run.is_named_later(planned):
        name_skipped(run, planned, batches.skipped)
    return slim


def finish(run: Run, student: FastSam, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Writes the model, measures it, and cleans up."""
    student, out = dataclasses.replace(student, provenance=run.provenance), run.options.out
    checkpoint.save(student, out)
    other = save_other(run, student)
    numbers = fast_sam_report.measure(run, student)
    numbers |= {"seconds": dict(seconds), "peak_memory_gb": peak_memory() / 1e9}
    write_json(out / "report.json", {**numbers, "provenance": student.provenance})
    run.folder.finish()
    fast_sam_report.print_table(numbers)
    say_what_to_do(out, [sample for sample in run.val if sample.name not in numbers["skipped"]], other)
    return numbers


STEP_FUNCTIONS: dict[type, StepFunction] = {Prune: prune_step, Distill: distill}
