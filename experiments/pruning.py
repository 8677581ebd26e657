"""What each way of pruning loses before any distillation: criteria, known bugs of the reference, bases, choices.

    python -m experiments.pruning run --teacher slimsam_jax/assets/sam_small_v2 --images bsds_train --val bsds_val
    python -m experiments.pruning table

`run` measures what experiments/results/pruning.jsonl does not hold yet: three seeds of each row of `ROWS` at 77 %. It
can be stopped at any time, and several can share the work (`--seeds 0`, `--seeds 1`). `table` writes the rows into
experiments/tables/pruning.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.from_torch import load
from experiments import results
from slimsam_jax import cli, data
from slimsam_jax.compression import prune
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import calibration_stream, on_devices
from slimsam_jax.compression.gradients import gradients
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.selection import choose
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Prune, Recipe
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import relative_error, single_mask_iou
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs

FILE = results.FOLDER / "pruning.jsonl"
IMAGES, BATCH = 100, 4  # that importance and statistics are taken from
SEEDS = (0, 1, 2)
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "slimsam": ("slimsam", ()),
    "slimsam, embedding not tied": ("slimsam", ("quirks.tied_embedding=false",)),
    "slimsam, rel. positions kept": ("slimsam", ("quirks.zeroed_rel_pos=false",)),
    "slimsam, logit scale kept": ("slimsam", ("quirks.jumping_logit_scale=false",)),
    "slimsam, rounded by importance": ("slimsam", ("quirks.rounded_by_index=false",)),
    "slimsam, vanishing blocks cut": ("slimsam", ("quirks.vanishing_kept=false",)),
    "slimsam, rms gradients": ("slimsam", ("prune.grad_reduction=rms",)),
    "taylor": ("taylor", ()),
    "taylor, labelled masks": ("taylor", ("prune.importance_loss=masks",)),
    "taylor, values apart": ("taylor", ("prune.head_channels=separate",)),
    "taylor, whole heads": ("taylor", ("prune.head_channels=whole",)),
    "fisher": ("taylor", ("prune.criterion=fisher",)),
    "magnitude": ("taylor", ("prune.criterion=magnitude",)),
    "random": ("taylor", ("prune.criterion=random",)),
    "default": ("default", ()),
    "default, not weighted": ("default", ("prune.importance_loss=none",)),
    "default, by kind": ("default", ("prune.allocation=global",)),
    "default, local": ("default", ("prune.allocation=local",)),
    "default, multiples of 8": ("default", ("prune.round_to=8",)),
}
RATIO = 0.77


def run(
    teacher: Path, images: Path, val: Path, seeds: tuple[int, ...] = SEEDS, only: tuple[str, ...] = tuple(ROWS)
) -> None:
    """Measure what is not measured yet.

    Args:
      teacher: the SAM to prune, called by the name of its file or folder.
      images: folder to take importance and statistics from.
      val: annotated folder to measure on.
      seeds: of images and noise.
      only: these rows alone.

    Raises:
      InputError: the code is no commit's, or there is no such row.
    """
    if unknown := [row for row in only if row not in ROWS]:
        raise InputError(f"--only {unknown[0]!r} is no row; there are {', '.join(ROWS)}")
    results.check_committed()
    bench = Bench(load(teacher), data.find([images]), data.find([val]))
    for seed, row in itertools.product(seeds, only):
        name, settings = ROWS[row]
        recipe = change(RECIPES[name], settings)
        key = {"teacher": teacher.stem, "row": row, "ratio": RATIO, "seed": seed}
        key |= {"recipe": prune_choices(recipe[0]), "images": IMAGES}
        if results.find(FILE, key):
            continue
        start = time.perf_counter()
        slim = bench.prune(recipe, RATIO, seed)
        numbers = bench.measure(slim) | {"seconds": time.perf_counter() - start}
        results.append(FILE, key | numbers)
        print(f"{row} {seed}: error {numbers['error']:.3g}, mIoU {numbers['point_miou']:.4f}", flush=True)


def prune_choices(step: Prune) -> dict[str, Any]:
    """Returns the choices of a step that prunes, whatever its part."""
    choices = dataclasses.asdict(step)
    del choices["part"], choices["ratio"], choices["quirks"]["self_aligned_global"]
    return choices


class Bench:
    """A teacher with what it takes to prune it and to measure the result; what runs share is computed once."""

    def __init__(self, teacher: Sam, images: list[data.Sample], val: list[data.Sample]):
        self.teacher, self.images = teacher, images
        self.val = [read_annotated(sample) for sample in val]
        self.embeddings = [encode_image(teacher, image).embedding for image, _ in self.val]
        self.gradients: dict[Any, Any] = {}
        self.batches: dict[Any, list[Any]] = {}

    def calibration(self, step: Prune, seed: int) -> Callable[[str], Iterable[Any]]:
        key = step.criterion == "projection", step.importance_loss, seed
        if key not in self.batches:
            stream = calibration_stream(step, self.images, self.teacher.config, BATCH, seed)
            self.batches[key] = list(itertools.islice(stream, IMAGES // BATCH))
        return lambda name: on_devices(iter(self.batches[key]), len(self.batches[key]))

    def prune(self, recipe: Recipe, ratio: float, seed: int) -> Sam:
        """Makes all cuts of a recipe, one after the other."""
        target, sam = Target(ratio), self.teacher
        for step in (step for step in recipe if isinstance(step, Prune)):
            calibration = self.calibration(step, seed)
            if step.criterion == "projection":
                sam = prune.prune(sam, step, target, calibration, seed)
                continue
            ungraded = not step.reads_gradients
            key = (ungraded, step.importance_loss, step.grad_reduction, step.noise_samples, seed)
            if sam is not self.teacher:
                grads = jax.device_get(gradients(sam, step, calibration, seed))
            elif key not in self.gradients:
                grads = self.gradients[key] = jax.device_get(gradients(sam, step, calibration, seed))
            else:
                grads = self.gradients[key]
            keep = choose(sam.config, sam.params["image_encoder"], grads, step, target, uniform=False, seed=seed)
            sam = prune.cut(sam, keep, step)
        return sam

    def measure(self, slim: Sam) -> dict[str, float]:
        """Measures the embedding's relative squared error and point mIoU, means over images; and the model's costs."""
        errors, ious = [], []
        for (image, masks), embedding in zip(self.val, self.embeddings, strict=True):
            encoded = encode_image(slim, image)
            errors.append(relative_error(encoded.embedding, embedding))
            ious.append(single_mask_iou(slim, encoded, masks))
        macs = sam_costs.encoder_macs(slim.config)
        return {
            "error": float(np.mean(errors)),
            "point_miou": float(np.mean(ious)),
            "encoder_parameters": sam_costs.encoder_parameters(slim.config),
            "macs_linear": macs.linear,
            "macs_total": macs.total,
        }


def table() -> None:
    """Write experiments/tables/pruning.md."""
    if not (entries := results.read(FILE)):
        return
    lines = ["| teacher | pruned by | encoder parameters | MACs, total | error | point mIoU |", "|---" * 6 + "|"]
    for teacher, row in itertools.product(dict.fromkeys(entry["teacher"] for entry in entries), ROWS):
        if runs := [entry for entry in entries if (entry["teacher"], entry["row"]) == (teacher, row)]:
            lines.append(f"| {results.called(teacher)} | {row} | {_cells(runs)} |")
    title, command = "Pruning 77 %, before any distillation", "python -m experiments.pruning table"
    results.write_table("pruning", title, lines, command, "../pruning.md")


def _cells(runs: list[dict[str, Any]]) -> str:
    column = lambda key: np.array([run[key] for run in runs])
    error, miou = column("error"), 100 * column("point_miou")
    spread = lambda values: f"{values.min():.2g} to {values.max():.2g}" if len(values) > 1 else "one seed"
    return " | ".join(
        [
            f"{column('encoder_parameters').mean() / 1e6:.2f} M",
            f"{column('macs_total').mean() / 1e9:.3f} G",
            f"{error.mean():.2g} ({spread(error)})",
            f"{miou.mean():.2f} ± {miou.std(ddof=1):.2f}" if len(runs) > 1 else f"{miou[0]:.2f}",
        ]
    )


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
