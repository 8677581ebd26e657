"""A small SAM 2 that learned from the small SAM, slimmed: by the default recipe and by the paper's, at two ratios.

    python -m experiments.hiera_end_to_end make --teacher TEACHER --images bsds_train --out FOLDER
    python -m experiments.hiera_end_to_end slim --teacher FOLDER --images bsds_train --val bsds_val
    python -m experiments.hiera_end_to_end table

No weights of SAM 2 can be had where this was written. `make` distils one: a Hiera drawn anew learns the teacher's
embedding, then its masks at clicks, with a decoder that begins as the teacher's. `slim` cuts it and measures as
`experiments.distillers` does: every run takes as many optimizer steps, the first photographs of `--val` choose among
three learning rates, the others are measured on, and what experiments/results/hiera.jsonl does not hold yet is run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import slimsam_jax
from experiments import distillers, results
from slimsam_jax import cli, data
from slimsam_jax.compression.student import where_they_agree
from slimsam_jax.compression.trainer import masks_at_clicks
from slimsam_jax.data.augment import flip_and_crop
from slimsam_jax.data.batches import Batches
from slimsam_jax.data.prompted import random_clicks
from slimsam_jax.distillation.schedules import learning_rates
from slimsam_jax.distillation.step import TrainState, init_state, make_optimizer, make_step
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.encoders.hiera_config import Config, uniform
from slimsam_jax.models.sam import Params, Sam, init, run_encoder
from slimsam_jax.models.sam2_head import HeadConfig
from slimsam_jax.progress import track

FILE = results.FOLDER / "hiera.jsonl"
BATCH, CLICKS = 8, 4
PLAN = distillers.Plan(images=(200,), steps=80, seeds=(0,), chosen_on=10, measured_on=40)
METHODS = {
    f"{recipe}, {100 * ratio:.0f} %": distillers.Method(recipe, ratio=ratio)
    for ratio in (0.5, 0.77)
    for recipe in ("default", "taylor")
}


def make(
    teacher: Path, images: str, out: Path, steps: int = 600, mask_steps: int = 150, lr: float = 2e-3, seed: int = 0
) -> None:
    """Distil a small SAM 2 from a SAM of 256 pixels.

    Args:
      teacher: whose embedding and masks are learned.
      images: folder to learn from.
      out: model folder to write.
      steps: of 8 images, towards the embedding alone.
      mask_steps: after them, towards embedding and masks.
      lr: the peak learning rate of the first steps; that of the others is a fifth.
      seed: of weights, images and clicks.
    """
    sam = slimsam_jax.load(teacher)
    student, samples = begun(sam, encoder(), seed), data.find([images])
    student = learned(sam, student, samples, {"embedding": 1.0}, ("image_encoder",), steps, lr, seed)
    weights = {"embedding": 1.0, "masks": 1.0, "iou": 0.1}
    both = ("image_encoder", "mask_decoder")
    student = learned(sam, student, samples, weights, both, mask_steps, lr / 5, seed + 1)
    slimsam_jax.save(student, out)


def encoder() -> Config:
    """A quarter of SAM 2.1 tiny's widths, for 256 pixels: 1.77 M parameters."""
    return uniform(32, 1, (1, 2, 4, 1), (5,), windows=(8, 4, 8, 4), image_size=256)


def begun(teacher: Sam, encoder: Config, seed: int) -> Sam:
    """A SAM 2 with random weights but for those of prompt encoder and decoder that the teacher has, too.

    Its finer maps begin at zero, so that the decoder does what the teacher's does; so is the predicted IoU not brought
    to 0..1 by a sigmoid, which the teacher's is not.
    """
    config = SamConfig(encoder, HeadConfig(image_size=encoder.image_size, iou_sigmoid=False))
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(seed))
    zero = functools.partial(jax.tree.map, jnp.zeros_like)
    own = {name: zero(x) if name.startswith("high_res") else x for name, x in params["image_encoder"].items()}
    given = {part: where_they_agree(params[part], teacher.params[part]) for part in ("prompt_encoder", "mask_decoder")}
    return Sam(config, {"image_encoder": own, **given})


def learned(
    teacher: Sam,
    student: Sam,
    samples: Any,
    weights: dict[str, float],
    parts: tuple[str, ...],
    steps: int,
    peak: float,
    seed: int,
) -> Sam:
    """Trains parts of the student by the terms that `weights` names, in the student's model frame."""

    def seen(config: Any, params: Params, batch: dict[str, Any]) -> dict[str, Any]:
        maps = run_encoder(config, params["image_encoder"], batch)[0]
        found = {"embedding": maps["embedding"] if isinstance(maps, dict) else maps}
        if "masks" in weights:
            found["masks"], found["iou"] = masks_at_clicks(config, params, maps, batch)
        return found

    forward = lambda params, frozen, batch: seen(student.config, {**frozen["student"], **params}, batch)
    target = lambda frozen, batch: seen(teacher.config, frozen["teacher"], batch)
    optimizer = make_optimizer(clip=1.0)
    step = make_step(forward, target, optimizer, relative=True)
    state = init_state({part: student.params[part] for part in parts}, optimizer)
    frozen = {"student": {part: student.params[part] for part in student.params if part not in parts}}
    state = trained(step, state, {**frozen, "teacher": teacher.params}, student, samples, weights, steps, peak, seed)
    return dataclasses.replace(student, params={**student.params, **jax.device_get(state.params)})


def trained(
    step: Any,
    state: TrainState,
    frozen: Any,
    student: Sam,
    samples: Any,
    weights: dict[str, float],
    steps: int,
    peak: float,
    seed: int,
) -> TrainState:
    """Takes the steps, and prints each term ten times."""
    clicks = lambda sample, size, random: random_clicks(size, CLICKS, random)
    how = {"augment": flip_and_crop(True, 0.7), "extra": clicks, "frame": student.config.frame}
    batches, rates = Batches(samples, student.config.image_size, BATCH, seed, **how), learning_rates(peak, steps)
    of_steps = track(itertools.islice(batches, steps), "+".join(weights), steps, per_item=BATCH, compiles=True)
    for index, batch in enumerate(of_steps):
        state, terms = step(state, frozen, batch, weights, float(rates[index]))
        if (index + 1) % max(1, steps // 10) == 0:
            shown = ", ".join(f"{name} {float(value):.4f}" for name, value in terms.items())
            print(f"step {index + 1}: {shown}", flush=True)
    batches.close()
    return state


def slim(
    teacher: Path,
    images: str,
    val: str,
    only: tuple[str, ...] = (),
    steps: int = PLAN.steps,
    seeds: tuple[int, ...] = PLAN.seeds,
) -> None:
    """Slim the small SAM 2, and add what is not measured yet to experiments/results/hiera.jsonl.

    Args:
      teacher: the model folder that `make` wrote.
      images: folder to learn from.
      val: annotated folder: 10 photographs to choose learning rates by, 40 to measure on.
      only: of these rows alone, by their names in the table.
      steps: of the optimizer, in all, 4 images each.
      seeds: of images and noise.
    """
    results.check_committed()
    plan = PLAN._replace(steps=steps, seeds=seeds)
    bench = distillers.Bench(slimsam_jax.load(teacher), data.find([val]), plan, METHODS, FILE)
    with tempfile.TemporaryDirectory() as folder:
        where = {"teacher": teacher, "images": (images,), "val": (bench.copied(Path(folder)),)}
        for label in only or METHODS:
            distillers.measure(bench, label, plan.images[0], plan, where)


def table() -> None:
    """Write experiments/tables/hiera.md."""
    command = "python -m experiments.hiera_end_to_end table"
    lines = distillers.lines_of(results.read(FILE), METHODS)
    results.write_table("hiera", "A small SAM 2, slimmed", lines, command, "../families.md")


if __name__ == "__main__":
    cli.run({"make": make, "slim": slim, "table": table})
