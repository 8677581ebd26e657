"""A compression run from checkpoint to report: what `python -m slimsam_jax.compress` does."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from slimsam_jax import checkpoint, cli, sharding
from slimsam_jax.compression import report, widths
from slimsam_jax.compression.calibration_images import batches_of, calibration_stream, on_devices
from slimsam_jax.compression.distill import distill
from slimsam_jax.compression.mask_distill import distill_masks
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.compression.pretrain import pretrain
from slimsam_jax.compression.prune import prune
from slimsam_jax.compression.quantize import quantized
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.steps import Distill, DistillMasks, Initialize, Pretrain, Prune, Quantize, Recipe
from slimsam_jax.compression.student import begins_anew, initialize, say_if_larger
from slimsam_jax.data import Sample
from slimsam_jax.data.samples import joined
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import write_json
from slimsam_jax.inference.calibration import calibrate
from slimsam_jax.models.encoders import family_of
from slimsam_jax.models.kinds import check_sam
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs
from slimsam_jax.profiling.memory import peak_memory
from slimsam_jax.progress import say, track
from slimsam_jax.training import preemption
from slimsam_jax.training.loop import best_of
from slimsam_jax.training.setup import too_many_of_val

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options

# The run, the step, the student, the model before the last cut -> the student after the step.
StepFunction = Callable[[Run, Planned, Sam, Sam], Sam]


def run(options: Options, teacher: Sam, recipe: Recipe | None = None, student: Sam | None = None) -> dict[str, Any]:
    """Runs a recipe from the teacher to the report, and returns the report; `api.compress_with` checks the options.

    Args:
      recipe: the steps, if not those that the options name.
      student: to begin with, if --student is a model's path.
    """
    whole = prepare(options, check_sam(teacher), recipe, student)
    with whole.folder, preemption.at_once("finished steps are kept: continue with --resume"):
        student, seconds = carry_out(whole)
        numbers = finish(whole, student, seconds) if sharding.is_main() else {}
    sharding.barrier("finished")
    if complaint := too_many_of_val(options, whole.images, whole.val, numbers.get("skipped", {})):
        raise RunError(f"{options.out} is finished, and measured on the rest; but {complaint}")
    return numbers


def carry_out(run: Run, functions: Mapping[type, StepFunction] | None = None) -> tuple[Sam, dict[str, float]]:
    """Takes the steps one after the other; returns the last one's model, and {step: its seconds}.

    Args:
      functions: of each kind of step, if the model is none that `STEP_FUNCTIONS` are for.
    """
    if run.cache and any(each.optimizer_steps for each in run.plan):  # cuts read none
        run.cache.fill(run.images)
        sharding.barrier("teacher's embeddings")
    student = previous = run.teacher
    seconds = {}
    for each in run.plan:
        start, before = time.perf_counter(), student
        student = run_or_load(run, each, student, previous, functions or STEP_FUNCTIONS)
        previous = before if isinstance(each.step, Prune) else previous
        seconds[each.name] = time.perf_counter() - start
    return student, seconds


def run_or_load(run: Run, planned: Planned, student: Sam, previous: Sam, functions: Mapping[type, StepFunction]) -> Sam:
    """Runs one step and saves its result, or loads what an interrupted run has saved of it (--resume)."""
    done = run.folder.load_model(planned.name, "model")
    sharding.barrier(f"{planned.name} looked for")  # before anybody writes it
    if done:
        return done
    run.folder.save_model(planned.name, "model", functions[type(planned.step)](run, planned, student, previous))
    return run.folder.load_model(planned.name, "model")  # in every process the same, to the bit


def finish(run: Run, student: Sam, seconds: dict[str, float]) -> dict[str, Any]:
    """Writes the model, measures it, and cleans up."""
    start, out = time.perf_counter(), run.options.out
    student = calibrated(run, dataclasses.replace(student, provenance=run.provenance))
    checkpoint.save(student, out)
    other = save_other(run, student)
    numbers = report.measure(run.teacher, student, run.val, run.dtype)
    if run.target.budget:
        numbers["budget"] = {**dataclasses.asdict(run.target.budget), "reached": run.target.budget.cost(student.config)}
    numbers["seconds"] = {**seconds, "measuring": time.perf_counter() - start}
    numbers["peak_memory_gb"] = peak_memory() / 1e9
    write_json(out / "report.json", {**numbers, "provenance": student.provenance})
    val = [sample for sample in run.val if sample.name not in numbers["skipped"]]
    shown = val if run.options.val else joined(val, run.images)  # a few that were held out seldom make a good figure
    report.draw(run.teacher, student, shown, numbers, run.folder.read_log(), out / "report.png")
    run.folder.finish()
    report.print_table(numbers)
    if run.target.budget and abs(numbers["budget"]["reached"] / run.target.budget.amount - 1) > 0.01:
        print("the budget is missed by more than 1 %: a smaller round_to, or none, comes nearer")
    if begins_anew(each.step for each in run.plan):
        say_if_larger(sam_costs.parameters(student.params), sam_costs.parameters(run.teacher.params))
    say_what_to_do(out, val, other)
    return numbers


def say_what_to_do(out: Path, val: Sequence[Sample], other: str | None = None) -> None:
    """Where the model is, and a command that runs as it stands if one of the images is a file.

    Args:
      other: what `save_other` has written, if anything.
    """
    files = ("model.safetensors", "config.json", "report.json", "log.jsonl")
    say("wrote", f"{out}/: {', '.join(name for name in files if (out / name).exists())}")
    if other:
        say("and", other)
    if (out / "report.png").exists():
        say("look at", f"{out}/report.png")
    photo = next((sample for sample in val if Path(sample.name).is_file()), None)
    size = photo.image().size if photo else None
    image, point = (photo.name, f"{size[0] // 2},{size[1] // 2}") if photo else ("PHOTO", "X,Y")
    arguments = ["--model", str(out), "--image", image, "--point", point, "--out", "mask.png"]
    say("next", f"{cli.called('predict')} {shlex.join(arguments)}")


def calibrated(run: Run, student: Sam) -> Sam:
    """The student with its own thresholds, which let as many masks pass as the teacher's do of the teacher's masks.

    With the teacher's, if there is nothing to measure by.
    """
    try:
        thresholds = calibrate(student, run.images, like=run.teacher)
    except InputError as error:  # a model that gives no masks, say, which is no reason to lose it
        print(f"the thresholds are the teacher's: {error}", flush=True)
        thresholds = run.teacher.thresholds
    return dataclasses.replace(student, thresholds=thresholds)


def save_other(run: Run, student: Sam) -> str | None:
    """The best or the last of the last distillation, whichever `student` is not, in a folder of that name.

    It gets the thresholds of `student`, from which it is a few steps away.

    Returns:
      A line that says where it is, and of which steps both are; None if nothing was written.
    """
    last = run.plan[-1]
    if not last.optimizer_steps:
        return None
    name = "last" if last.step.validation.keep_checkpoint == "best" else "best"
    other = run.folder.load_model(last.name, name)
    same = lambda a, b: bool((np.asarray(a) == np.asarray(b)).all())
    if not other or all(jax.tree.leaves(jax.tree.map(same, other.params, student.params))):
        return None
    thresholds = {"thresholds": student.thresholds} if isinstance(student, Sam) else {}
    other = dataclasses.replace(other, provenance=run.provenance, **thresholds)
    checkpoint.save(other, run.options.out / name)
    scores = {e["step"]: e["score"] for e in run.folder.read_log() if e.get("stage") == last.name and "score" in e}
    best = f", of step {best_of(scores)}" if scores else ""  # of a log that somebody has removed
    steps = {"last": f"the last, of step {last.optimizer_steps}", "best": f"the best{best}"}
    kept = steps.pop("best" if name == "last" else "last")
    return f"{run.options.out / name}/: {steps[name]}; the model itself is {kept} of {last.name}"


def prune_step(run: Run, planned: Planned, student: Sam, previous: Sam) -> Sam:
    """The step `Prune`, on images of the run."""
    options, step, config = run.options, planned.step, run.teacher.config
    devices = sharding.device_count()  # an image on each: more would take as many times the memory
    count = batches_of(min(options.importance_images, len(run.images)), devices)
    streams = []

    def calibration(name: str) -> Iterable[Any]:
        batches = calibration_stream(step, run.images, config, devices, options.seed, options.broken_share())
        streams.append(batches)
        return track(on_devices(batches, count), f"{planned.name}: {name}", count, per_item=devices, compiles=True)

    slim = prune(student, step, widths.target_of(step, run.target), calibration, options.seed, options.uniform)
    slim = without_misfits(slim, student)
    for batches in streams:
        batches.agree_on_skipped()
    if not run.is_named_later(planned):
        name_skipped(run, planned, {name: reason for batches in streams for name, reason in batches.skipped.items()})
    return slim


def without_misfits(slim: Sam, before: Sam) -> Sam:
    """Without the arrays kept aside for the way back (`Sam.kept`), if the cut has changed what they belong to."""
    fits = getattr(family_of(slim.config.encoder), "keeps_unread", lambda config, before: True)
    if not slim.kept or fits(slim.config.encoder, before.config.encoder):
        return slim
    print("the teacher's classifier, which nothing runs, is as wide as a stage was before: it is left out", flush=True)
    return dataclasses.replace(slim, kept={})


def name_skipped(run: Run, planned: Planned, skipped: Mapping[str, str]) -> None:
    """Names images that could not be read, {name: reason}, on the screen and in the log."""
    for name, reason in sorted(skipped.items()):
        run.folder.log(stage=planned.name, skipped=name, reason=reason)
        print(f"skipped: {reason}", flush=True)


def quantize_step(run: Run, planned: Planned, student: Sam, previous: Sam) -> Sam:
    """The step `Quantize`, calibrated on images of the run; every process does all of it."""
    new, skipped = quantized(student, run.images, planned.step, run.options.seed, run.options.broken_share())
    if not run.is_named_later(planned):
        name_skipped(run, planned, skipped)
    return new


STEP_FUNCTIONS: dict[type, StepFunction] = {
    Prune: prune_step,
    Distill: distill,
    DistillMasks: distill_masks,
    Pretrain: pretrain,
    Initialize: initialize,
    Quantize: quantize_step,
}
