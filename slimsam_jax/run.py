"""A compression run from checkpoint to report: what `python -m slimsam_jax.compress` does."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from converters.from_torch import load
from slimsam_jax import __version__, checkpoint, data, labels, report, train, widths
from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import Sam
from slimsam_jax.progress import track
from slimsam_jax.prune import prune as prune_sam
from slimsam_jax.recipes import RECIPES, STAGES, Recipe, Stage
from slimsam_jax.run_folder import RunFolder
from slimsam_jax.widths import Budget, Target

if TYPE_CHECKING:
    from slimsam_jax.compress import Options


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share."""

    options: Options
    recipe: Recipe
    target: Target
    teacher: Sam
    images: list[Path]
    steps: int
    batch: int
    dtype: Any
    folder: RunFolder
    provenance: dict[str, Any]


def run(options: Options) -> dict[str, Any]:
    """See `compress.compress`, which checks the options first."""
    run, val = prepare(options)
    student, seconds = run.teacher, {}
    for stage in STAGES:
        start = time.perf_counter()
        student = slim(run, stage, student)
        seconds[f"{stage.name} stage"] = time.perf_counter() - start

    start = time.perf_counter()
    student = dataclasses.replace(student, provenance=run.provenance)
    checkpoint.save(student, options.out)
    numbers = report.measure(run.teacher, student, val, run.dtype)
    if run.target.budget:
        numbers["budget"] = {
            **dataclasses.asdict(run.target.budget),
            "reached": run.target.budget.cost(student.config),
        }
    numbers["seconds"] = {**seconds, "measuring": time.perf_counter() - start}
    checkpoint.write_json(options.out / "report.json", {**numbers, "provenance": student.provenance})
    val = [path for path in val if str(path) not in numbers["skipped"]]
    report.draw(run.teacher, student, val, run.folder.read_log(), options.out / "report.png")
    run.folder.finish()
    report.print_table(numbers)
    if run.target.budget and abs(numbers["budget"]["reached"] / run.target.budget.amount - 1) > 0.01:
        print("the budget is missed by more than 1 %: a smaller multiple, or none, comes nearer")
    return numbers


def prepare(options: Options) -> tuple[Run, list[Path]]:
    """Everything that can be refused is refused here, before anything is written."""
    devices = jax.local_device_count()
    batch = options.batch or devices * -(-4 // devices)
    if batch % devices:
        raise InputError(f"--batch {batch} must be a multiple of the {devices} devices")
    recipe = RECIPES[options.recipe].change(options.set)
    budget = None if options.budget is None else Budget.parse(options.budget)
    target = Target(options.channel_ratio(), budget)
    if budget and recipe.normalizer == "gaussian" and recipe.criterion != "projection":
        raise InputError("--budget needs scores that are not negative; add --set normalizer=none")
    if recipe.whole_heads and (options.uniform or options.budget):
        raise InputError("whole_heads goes neither with --uniform nor with --budget: they fix the number of heads")
    teacher = load(options.teacher or data.embedded_teacher())
    if options.uniform and not teacher.config.uniform:
        raise InputError("--uniform needs a teacher whose blocks are alike, and this one's are not")
    images, val = split_images(options)
    if options.batch and batch > max(len(images), devices):
        raise InputError(f"--batch {batch} is more than the {len(images)} images to learn from")
    for paths in (images, val):
        data.check_one_is_readable(paths)
    if recipe.needs_labels:
        labels.annotated(images)
    if not options.resume:  # a latency may be measured otherwise the second time
        widths.check(teacher.config, target, recipe, options.uniform)
    steps = max(1, recipe.passes * len(images) // batch) if options.steps is None else options.steps
    origin = provenance(options, recipe, teacher, images, steps, batch)
    folder = RunFolder(options.out, origin, options.resume)
    return Run(options, recipe, target, teacher, images, steps, batch, compute_dtype(options), folder, origin), val


def split_images(options: Options) -> tuple[list[Path], list[Path]]:
    """Paths to learn from, and paths to measure on."""
    images = data.find_images(options.images or [data.embedded_images()])
    if options.val:
        return images, data.find_images(options.val)
    val = images[:: max(8, -(-len(images) // 50))]
    return [path for path in images if path not in set(val)] or images, val


def compute_dtype(options: Options) -> Any:
    if options.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(options.dtype)


def slim(run: Run, stage: Stage, previous: Sam) -> Sam:
    """One stage: prune `previous`, distil the result; picks up wherever the folder says it stopped."""
    student = run.folder.load_model(stage.name, "distilled")
    if student:
        return student
    student = run.folder.load_model(stage.name, "pruned")
    if not student:
        student = prune(run, stage, previous)
        run.folder.save_model(stage.name, "pruned", student)
    if run.steps:
        student = distil(run, stage, student, previous)
    run.folder.save_model(stage.name, "distilled", student)
    return student


def prune(run: Run, stage: Stage, previous: Sam) -> Sam:
    options, config = run.options, run.teacher.config
    devices = jax.local_device_count()  # an image on each: more would take as many times the memory
    count = max(1, min(options.importance_images, len(run.images)) // devices)

    def calibration(name: str) -> Iterable[Any]:
        batches = labels.calibration_stream(run.recipe, run.images, config, devices, options.seed)
        return track(train.calibration(batches, count), name, count, per_item=devices)

    return prune_sam(previous, stage, run.recipe, run.target, calibration, options.seed, options.uniform)


def distil(run: Run, stage: Stage, student: Sam, previous: Sam) -> Sam:
    options, steps, folder = run.options, run.steps, run.folder
    step_fn, state, frozen = train.make_trainer(student, previous, run.teacher, stage, run.recipe, steps, run.dtype)
    batches = data.Batches(run.images, run.teacher.config.image_size, run.batch, options.seed + 1)
    with folder.steps(stage.name) as manager:
        state = folder.restore_step(manager, state, batches)
        done = int(state.step)
        folder.rewind_log(stage.name, done)
        training = train.train(step_fn, state, frozen, batches, steps)
        training = track(training, f"{stage.name} stage", steps - done, per_item=run.batch)
        for step, (state, terms) in enumerate(training, done + 1):
            if step % max(1, steps // 100) == 0 or step == steps:
                folder.log(stage=stage.name, step=step, **{name: float(term) for name, term in terms.items()})
            if step % options.save_every == 0 or step == steps:
                train.check_loss(terms, step)
                folder.save_step(manager, step, state, batches)
    for path, reason in batches.skipped.items():
        folder.log(stage=stage.name, skipped=str(path), reason=reason)
        print(f"skipped: {reason}", flush=True)
    encoder = jax.tree.map(jnp.asarray, jax.device_get(state.params))  # off the mesh, like every other model
    return dataclasses.replace(student, params={**student.params, "image_encoder": encoder})


def provenance(
    options: Options, recipe: Recipe, teacher: Sam, images: list[Path], steps: int, batch: int
) -> dict[str, Any]:
    """Where a slim model comes from, for its config.json; a resumed run must agree in all of it."""
    path = Path(options.teacher or data.embedded_teacher())
    names = "\n".join(str(image) for image in images)
    packages = ("jax", "flax", "optax", "numpy")
    return {
        "teacher": {"file": path.name, "sha256": checkpoint.sha256(path), "provenance": teacher.provenance},
        "images": {"count": len(images), "sha256_of_names": hashlib.sha256(names.encode()).hexdigest()},
        "options": {**options.fixing_the_result(), "steps": steps, "batch": batch},
        "recipe": dataclasses.asdict(recipe),
        "versions": {"slimsam_jax": __version__, **{name: version(name) for name in packages}},
    }
