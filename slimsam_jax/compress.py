"""A SAM and a folder of images in, a slim SAM out. `python -m slimsam_jax.compress`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimsam_jax import cli
from slimsam_jax.errors import InputError

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Sam
    from slimsam_jax.recipes import Recipe, Stage
    from slimsam_jax.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Options:
    """Compress a Segment Anything Model with unlabelled images.

    Alternate slimming (SlimSAM, Chen et al., NeurIPS 2024): prune the embedding, distil, prune the
    attention heads and MLPs, distil. Without arguments a small SAM and the photographs that ship
    with the package are used, and a slim model appears in ./slim after a few minutes on a CPU.

    The output folder holds model.safetensors, config.json (architecture and provenance), report.json
    (every number of the table printed at the end), log.jsonl and report.png.
    """

    teacher: Path | None = None
    """The SAM to compress: a .pth in segment_anything layout (fused qkv, or q, k and v apart), a Hugging
    Face SamModel folder, or a model folder of ours. Default: the small SAM in the package."""
    images: tuple[Path, ...] = ()
    """Folders of images to learn from, searched recursively; no labels needed. Default: the photographs
    in the package."""
    val: tuple[Path, ...] = ()
    """Folders of images to measure on. An SA-1B .json of the same name beside an image makes it count for
    mIoU. Default: an eighth of --images, held out."""
    ratio: float = 0.5
    """Share of the channels to remove, between 0 and 1. Parameters and work fall about with its square:
    0.5 leaves a quarter of the encoder, 0.77 a sixteenth."""
    recipe: Literal["default", "slimsam"] = "default"
    """"default" is ours; "slimsam" does what the original code does (slimsam_jax/recipes.py lists the
    differences with reasons)."""
    uniform: bool = False
    """Prune every block alike, so that the result loads into stock segment_anything and transformers."""
    steps: int | None = None
    """Optimiser steps per stage. Default: 12 passes over the images (slimsam: 20, as in the paper)."""
    batch: int = 4
    """Images per step, a multiple of the number of devices."""
    importance_images: int = 100
    """Images that the importance of channels is estimated from, before each pruning."""
    seed: int = 0
    """Of noise and order; on the same machine the same seed gives the same model."""
    out: Path = Path("slim")
    """The folder to write. Must not exist or be empty, unless --resume is given."""
    resume: bool = False
    """Continue the unfinished run in --out, with the same options."""
    save_every: int = 100
    """Steps between two checkpoints for --resume."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation while distilling; parameters stay float32. "auto" is bfloat16 on GPU and TPU."""

    def check(self) -> None:
        """Raises InputError for what can be told wrong without looking at files."""
        if not 0 < self.ratio < 1:
            raise InputError(f"--ratio {self.ratio:g} is not the share of channels to remove: 0 < ratio < 1")
        for name in ("steps", "batch", "importance_images", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not self.resume:
            cli.check_empty(self.out)

    def fixing_the_result(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues."""
        fields = dataclasses.asdict(self)
        for name in ("out", "resume", "save_every"):
            del fields[name]
        fields["teacher"] = str(self.teacher) if self.teacher else None
        return fields | {name: [str(path) for path in fields[name]] for name in ("images", "val")}


def compress(options: Options) -> dict[str, Any]:
    """Runs the whole compression.

    Returns:
      The report, as in `report.json`.

    Raises:
      InputError: bad options or files; nothing has been written then.
      RunError, OSError: a fault while running; the folder can be resumed.
    """
    options.check()
    import jax

    from converters.from_torch import load
    from slimsam_jax import checkpoint, data, report
    from slimsam_jax.recipes import RECIPES, STAGES
    from slimsam_jax.run_folder import RunFolder

    recipe = RECIPES[options.recipe]
    if options.batch % jax.device_count():
        raise InputError(f"--batch {options.batch} must be a multiple of the {jax.device_count()} devices")
    teacher = load(options.teacher or data.embedded_teacher())
    train, val = split_images(options)
    steps = options.steps or max(1, recipe.passes * len(train) // options.batch)
    folder = RunFolder(options.out, options.fixing_the_result(), options.resume)

    student, seconds = teacher, {}
    for stage in STAGES:
        start = time.perf_counter()
        student = slim_stage(student, teacher, stage, recipe, options, train, steps, folder)
        seconds[f"{stage.name} stage"] = time.perf_counter() - start

    start = time.perf_counter()
    student = dataclasses.replace(student, provenance=provenance(options, teacher, steps))
    numbers = report.measure(teacher, student, val, compute_dtype(options))
    numbers["seconds"] = {**seconds, "measuring": time.perf_counter() - start}
    checkpoint.save(student, options.out)
    checkpoint.write_json(options.out / "report.json", {**numbers, "provenance": student.provenance})
    report.draw(teacher, student, val, folder.read_log(), options.out / "report.png")
    folder.finish()
    report.print_table(numbers)
    return numbers


def slim_stage(
    previous: Sam,
    teacher: Sam,
    stage: Stage,
    recipe: Recipe,
    options: Options,
    train: list[Path],
    steps: int,
    folder: RunFolder,
) -> Sam:
    """One stage: prune `previous`, distil the result; picks up wherever the folder says it stopped."""
    from slimsam_jax import data, slimming

    done = folder.load_model(stage.name, "distilled")
    if done:
        return done
    student = folder.load_model(stage.name, "pruned")
    if not student:
        print(f"{stage.name} stage: pruning", flush=True)
        batches = data.Batches(train, teacher.config.image_size, options.batch, options.seed)
        calibration = slimming.calibration(batches, min(options.importance_images, len(train)), options.batch)
        student = slimming.prune(previous, stage, recipe, options.ratio, calibration, options.seed, options.uniform)
        folder.save_model(stage.name, "pruned", student)
    student = distil_stage(student, previous, teacher, stage, recipe, options, train, steps, folder)
    folder.save_model(stage.name, "distilled", student)
    return student


def distil_stage(
    student: Sam,
    previous: Sam,
    teacher: Sam,
    stage: Stage,
    recipe: Recipe,
    options: Options,
    train: list[Path],
    steps: int,
    folder: RunFolder,
) -> Sam:
    import jax
    import jax.numpy as jnp

    from slimsam_jax import data, slimming
    from slimsam_jax.progress import track

    trainer, state, frozen = slimming.make_trainer(
        student, previous, teacher, stage, recipe, steps, compute_dtype(options)
    )
    batches = data.Batches(train, teacher.config.image_size, options.batch, options.seed + 1)
    with folder.steps(stage.name) as manager:
        state = folder.restore_step(manager, state, batches)
        done = int(state.step)
        folder.rewind_log(stage.name, done)
        run = slimming.train(trainer, state, frozen, batches, steps)
        for step, (state, terms) in enumerate(
            track(run, f"{stage.name} stage", steps - done, per_item=options.batch), done + 1
        ):
            if step % max(1, steps // 100) == 0 or step == steps:
                folder.log(stage=stage.name, step=step, **{name: float(term) for name, term in terms.items()})
            if step % options.save_every == 0 or step == steps:
                folder.save_step(manager, step, state, batches)
    for path, reason in batches.skipped.items():
        folder.log(stage=stage.name, skipped=str(path), reason=reason)
        print(f"skipped: {reason}", flush=True)
    encoder = jax.tree.map(jnp.asarray, jax.device_get(state.params))  # off the mesh, like every other model
    return dataclasses.replace(student, params={**student.params, "image_encoder": encoder})


def split_images(options: Options) -> tuple[list[Path], list[Path]]:
    """Paths to learn from, and paths to measure on."""
    from slimsam_jax import data

    images = data.find_images(options.images or [data.embedded_images()])
    if options.val:
        return images, data.find_images(options.val)
    return [p for i, p in enumerate(images) if i % 8 or len(images) == 1], images[::8]


def compute_dtype(options: Options) -> Any:
    import jax
    import jax.numpy as jnp

    if options.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(options.dtype)


def provenance(options: Options, teacher: Sam, steps: int) -> dict[str, Any]:
    """Where a slim model comes from, for its config.json."""
    from importlib.metadata import version

    packages = ("slimsam_jax", "jax", "flax", "optax", "numpy")
    return {
        "teacher": teacher.provenance,
        "options": {**options.fixing_the_result(), "steps": steps},
        "versions": {name: version(name) for name in packages},
    }


def main() -> None:
    cli.run(Options, compress)


if __name__ == "__main__":
    main()
