"""A compression run from checkpoint to report: what `python -m slimsam_jax.compress` does."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import __version__, checkpoint, data, sharding
from slimsam_jax.compression import report, widths
from slimsam_jax.compression.budget import Budget, Target
from slimsam_jax.compression.calibration import calibration_stream, on_devices
from slimsam_jax.compression.distill import distil
from slimsam_jax.compression.prune import prune as prune_sam
from slimsam_jax.compression.recipes import RECIPES, Recipe
from slimsam_jax.compression.steps import Stage, plan, steps_of
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.compression.validation import IMAGES, validator
from slimsam_jax.data import Sample
from slimsam_jax.data.prompted import annotated
from slimsam_jax.data.reading import map_readable, read_annotated
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import write_json
from slimsam_jax.inference.calibration import calibrate
from slimsam_jax.models.encoders.vit import ImageEncoder
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling.memory import peak_memory
from slimsam_jax.progress import say, track
from slimsam_jax.training.run_folder import RunFolder

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options
from slimsam_jax.compression.run import Run
from slimsam_jax.training.setup import batch_size, check_batch, compute_dtype, some_of, split_images, too_many_of_val


def run(options: Options, teacher: Sam) -> dict[str, Any]:
    """See `compress.compress`, which checks the options first."""
    run = prepare(options, teacher)
    with run.folder:
        return carry_out(run)


def carry_out(run: Run) -> dict[str, Any]:
    """What is left to do once nothing can be refused any more; returns the report."""
    options = run.options
    if run.cache:
        run.cache.fill(run.images)
        sharding.barrier("teacher's embeddings")
    student, seconds = run.teacher, {}
    for stage in run.stages:
        start = time.perf_counter()
        student = slim(run, stage, student)
        seconds[f"{stage.name} stage"] = time.perf_counter() - start
    numbers = finish(run, student, seconds) if sharding.is_main() else {}
    sharding.barrier("finished")
    if complaint := too_many_of_val(options, run.images, run.val, numbers.get("skipped", {})):
        raise RunError(f"{options.out} is finished, and measured on the rest; but {complaint}")
    return numbers


def finish(run: Run, student: Sam, seconds: dict[str, float]) -> dict[str, Any]:
    """Writes the model, measures it, and cleans up."""
    start, out = time.perf_counter(), run.options.out
    student = calibrated(run, dataclasses.replace(student, provenance=run.provenance))
    checkpoint.save(student, out)
    save_other(run, student)
    numbers = report.measure(run.teacher, student, run.val, run.dtype)
    if run.target.budget:
        numbers["budget"] = {**dataclasses.asdict(run.target.budget), "reached": run.target.budget.cost(student.config)}
    numbers["seconds"] = {**seconds, "measuring": time.perf_counter() - start}
    numbers["peak_memory_gb"] = peak_memory() / 1e9
    write_json(out / "report.json", {**numbers, "provenance": student.provenance})
    val = [sample for sample in run.val if sample.name not in numbers["skipped"]]
    shown = val if run.options.val else val + run.images  # a few that were held out seldom make a good picture
    report.draw(run.teacher, student, shown, numbers, run.folder.read_log(), out / "report.png")
    run.folder.finish()
    report.print_table(numbers)
    if run.target.budget and abs(numbers["budget"]["reached"] / run.target.budget.amount - 1) > 0.01:
        print("the budget is missed by more than 1 %: a smaller multiple, or none, comes nearer")
    say_what_to_do(out, val)
    return numbers


def say_what_to_do(out: Path, val: Sequence[Sample]) -> None:
    """Where the model is, and a command that runs as it stands if one of the images is a file."""
    say("wrote", f"{out}/: model.safetensors, config.json, report.json, log.jsonl")
    say("look at", f"{out}/report.png")
    photo = next((sample for sample in val if Path(sample.name).is_file()), None)
    size = photo.image().size if photo else None
    image, point = (photo.name, f"{size[0] // 2},{size[1] // 2}") if photo else ("PHOTO", "X,Y")
    command = ["python", "-m", "slimsam_jax.predict", "--model", str(out), "--image", image, "--point", point]
    say("next", shlex.join([*command, "--out", "mask.png"]))


def calibrated(run: Run, student: Sam) -> Sam:
    """With thresholds that as many masks pass as of the teacher; with the teacher's if there is nothing to go by."""
    try:
        thresholds = calibrate(student, run.images, like=run.teacher)
    except InputError as error:  # a model that gives no masks, say, which is no reason to lose it
        print(f"the thresholds are the teacher's: {error}", flush=True)
        thresholds = run.teacher.thresholds
    return dataclasses.replace(student, thresholds=thresholds)


def save_other(run: Run, student: Sam) -> None:
    """The best or the last of the last stage, whichever `student` is not, in a folder of that name.

    It gets the thresholds of `student`, from which it is a few steps away.
    """
    name = "last" if run.recipe.keep == "best" else "best"
    other = run.folder.load_model(run.stages[-1].name, name)
    same = lambda a, b: bool((np.asarray(a) == np.asarray(b)).all())
    if other and not all(jax.tree.leaves(jax.tree.map(same, other.params, student.params))):
        other = dataclasses.replace(other, provenance=run.provenance, thresholds=student.thresholds)
        checkpoint.save(other, run.options.out / name)


def prepare(options: Options, teacher: Sam) -> Run:
    """Everything that can be refused is refused here, before anything is written."""
    batch, recipe = batch_size(options), RECIPES[options.recipe].change(options.set)
    target = Target(options.channel_ratio(), Budget.parse(options.budget) if options.budget is not None else None)
    check_combinations(options, recipe, target)
    if options.uniform and not teacher.config.uniform:
        raise InputError("--uniform needs a teacher whose blocks are alike, and this one's are not")
    images, val = split_images(options)
    images = some_of(images, options.limit, options.seed)
    check_batch(options, batch, len(images))
    for paths in (images, val):
        data.check_one_is_readable(paths)
    _, broken = map_readable(lambda sample: read_annotated(sample) and None, val[:IMAGES])  # as validation will
    if complaint := too_many_of_val(options, images, val, broken):
        raise InputError(complaint)
    if recipe.needs_labels:
        annotated(images)
    if not options.resume:  # a latency may be measured otherwise the second time
        widths.check(teacher.config, target, recipe, options.uniform)
    steps = max(1, recipe.passes * len(images) // batch) if options.steps is None else options.steps
    steps_of(plan(recipe), steps)  # there are enough
    dtype = compute_dtype(options)
    if sharding.is_main():
        announce(dtype, steps_of(plan(recipe), steps), batch, len(images), len(val))
    origin = provenance(options, recipe, teacher, images, steps, batch)
    cache = TeacherCache(options.cache, teacher, origin["teacher"]["sha256"]) if options.cache else None
    score = validator(teacher, val, recipe.validate_by) if steps and sharding.is_main() else None
    folder = RunFolder(options.out, origin, options.resume)
    return Run(options, recipe, target, teacher, images, val, steps, batch, dtype, cache, score, folder, origin)


def announce(dtype: Any, steps: Mapping[str, int], batch: int, images: int, val: int) -> None:
    """What `compress.announce` could not know yet."""
    say("device", f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jnp.dtype(dtype).name}")
    distilled = ", ".join(f"{count} in the {stage} stage" for stage, count in steps.items() if count)
    say("steps", f"{distilled or 'none'}, of {batch} images; {images} images to learn from, {val} to measure on")


def check_combinations(options: Options, recipe: Recipe, target: Target) -> None:
    """Raises InputError for choices that do not go together."""
    if target.budget and recipe.normalizer == "gaussian" and recipe.criterion != "projection":
        raise InputError("--budget needs scores that are not negative; add --set normalizer=none")
    if recipe.rounds > 1 and target.budget:
        raise InputError("rounds share out a --ratio; a --budget is met in one")
    if recipe.rounds > 1 and (recipe.reference_selection or recipe.whole_heads):
        raise InputError("rounds go neither with reference_selection nor with whole_heads, which round each cut")
    if recipe.whole_heads and (options.uniform or target.budget):
        raise InputError("whole_heads goes neither with --uniform nor with --budget: they fix the number of heads")
    if target.budget and target.budget.kind == "latency" and jax.process_count() > 1:
        raise InputError("--budget latency is measured by one process; give params= or macs=, or no --distributed")
    if options.cache and (recipe.flip or recipe.crop < 1):
        raise InputError("--cache holds the teacher's embeddings of whole pictures; it goes with neither flip nor crop")


def slim(run: Run, stage: Stage, previous: Sam) -> Sam:
    """One stage: prune `previous`, distil the result; picks up wherever the folder says it stopped."""
    distilled, student = (run.folder.load_model(stage.name, part) for part in ("distilled", "pruned"))
    sharding.barrier(f"{stage.name} looked for")  # before anybody writes them
    if distilled:
        return distilled
    if not student:
        run.folder.save_model(stage.name, "pruned", prune(run, stage, previous) if stage.cuts else previous)
        student = run.folder.load_model(stage.name, "pruned")  # in every process the same, to the bit
    if run.steps_of(stage):
        student = distil(run, stage, student, previous)
    run.folder.save_model(stage.name, "distilled", student)
    return student


def prune(run: Run, stage: Stage, previous: Sam) -> Sam:
    options, recipe, config = run.options, run.recipe, run.teacher.config
    devices = jax.device_count()  # an image on each: more would take as many times the memory
    count = max(1, min(options.importance_images, len(run.images)) // devices)
    streams = []

    def calibration(name: str) -> Iterable[Any]:
        batches = calibration_stream(recipe, run.images, config, devices, options.seed, options.broken_share())
        streams.append(batches)
        name = f"{stage.name}: {name}"
        return track(on_devices(batches, count), name, count, per_item=devices, compiles=True)

    recipe = dataclasses.replace(recipe, least=recipe.least**stage.cut)  # all rounds together leave the least
    slim = prune_sam(previous, stage, recipe, run.target.part(stage.cut), calibration, options.seed, options.uniform)
    for batches in streams:
        batches.agree_on_skipped()
    if not run.steps_of(stage):  # else distillation, which meets every image, names them
        name_skipped(run, stage, {name: reason for batches in streams for name, reason in batches.skipped.items()})
    return drawn_anew(slim, options.seed) if recipe.scratch and stage.cuts == "bottleneck" else slim


def name_skipped(run: Run, stage: Stage, skipped: Mapping[str, str]) -> None:
    for name, reason in sorted(skipped.items()):
        run.folder.log(stage=stage.name, skipped=name, reason=reason)
        print(f"skipped: {reason}", flush=True)


def drawn_anew(sam: Sam, seed: int) -> Sam:
    """An image encoder of the same widths with random weights."""
    encoder = jax.jit(ImageEncoder(sam.config).init)(jax.random.key(seed), jnp.zeros((1, *sam.config.image_size, 3)))
    return dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder["params"]})


def provenance(
    options: Options, recipe: Recipe, teacher: Sam, images: list[Sample], steps: int, batch: int
) -> dict[str, Any]:
    """Where a slim model comes from, for its config.json; a resumed run must agree in all of it."""
    path = Path(options.teacher or data.embedded_teacher())
    names = "\n".join(image.name for image in images).encode(errors="surrogatepass")  # which may be no UTF-8
    packages = ("jax", "flax", "optax", "numpy")
    return {
        "teacher": {"file": path.name, "sha256": checkpoint.sha256(path), "provenance": teacher.provenance},
        "images": {"count": len(images), "sha256_of_names": hashlib.sha256(names).hexdigest()},
        "options": {**options.fixing_the_result(), "steps": steps, "batch": batch},
        "recipe": dataclasses.asdict(recipe),
        "versions": {"slimsam_jax": __version__, **{name: version(name) for name in packages}},
    }
