"""Measures models on annotated images. `python -m slimsam_jax.evaluate --model A B --data D`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimsam_jax import api, cli
from slimsam_jax.cli.checks import check_files, check_spared
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.checks import Protocol

if TYPE_CHECKING:
    from slimsam_jax.evaluation.run import Evaluation


def main(
    model: tuple[Path, ...],
    data: tuple[str, ...] = (),
    protocol: tuple[Protocol, ...] = (),
    boxes: Path | None = None,
    clicks: int = 10,
    points_per_side: int = 32,
    seed: int = 0,
    resamples: int = 10_000,
    max_broken: float = 0.1,
    strict: bool = False,
    costs: bool = True,
    json: Path | None = None,
    markdown: Path | None = None,
    figure: Path | None = None,
    distributed: str | None = None,
    engine: Literal["auto", "jax", "onnxruntime"] = "auto",
) -> None:
    """Measure SAMs on the same images, and how much they differ.

    Each annotation of an image gives one prompt; the mask is compared with it at the image's own size. Mean over
    annotations, then over images. Intervals are 95 % bootstrap intervals over images; of all models but the first
    they are of the difference to the first, paired by image. Beside the scores stands what each model costs:
    parameters, multiply-accumulates, milliseconds and memory of its encoder on this machine. Without --data that alone
    is measured.

    Args:
      model: model folders, .pth files, or Hugging Face SamModel or Sam2Model folders.
      data: images with annotations: folders in SA-1B's layout, .tar shards, a COCO .json, tfds:DIR.
      protocol: what a prompt is: the annotation's own point (SlimSAM's protocol), an interior point of its mask,
        its box, its box with noise, or clicks that correct the mask before them; or everything: average recall of the
        first 10, 100 and 1000 masks of everything mode, which takes long; or agreement with the first model's
        masks for a grid of points, which needs no annotations. Default: point box, or with --boxes none.
      boxes: a detector's boxes as prompts, in COCO's results format: COCO AP. Needs pycocotools, and as --data a COCO
        .json, or a folder with annotations.json.
      clicks: how many, for --protocol clicks.
      points_per_side: of the grid for --protocol everything.
      seed: of the noise on boxes and of the intervals.
      resamples: for the intervals; of AP 1000 at most, which takes longer.
      max_broken: the share of images that may be unreadable; more stop the evaluation. The others are named.
      strict: stop at the first image that cannot be read.
      costs: measure those, too.
      json: write all numbers, per image too, with the hashes of models and data.
      markdown: write the table.
      figure: write a PNG: each image's score of one model against the first's, and masks of the worst images.
      distributed: for several processes, each with the same arguments, which share the images and of which the first
        prints and writes: "auto" on TPU pods and under SLURM or MPI; or HOST:PORT,PROCESSES,INDEX, where HOST:PORT is
        a free port of process 0.
      engine: what computes image encoders. onnxruntime exports each once into the user's cache folder; "auto" takes it
        for models for which that was done on this machine, and measured faster than JAX. Costs are JAX's.
    """
    if not data:
        if protocol or boxes or json or markdown or figure or distributed or not costs:
            raise InputError("--data needs at least one value; without it only costs are measured and printed")
        return print_costs(model)
    if figure and boxes and not protocol:
        raise InputError("--figure needs a --protocol: AP has no score per image to draw")
    outputs = {"json": json, "markdown": markdown, "figure": figure}
    check_files([path for path in outputs.values() if path])
    inputs = {"--data": data, "--boxes": [boxes], "--model": model}
    check_spared({f"--{kind}": path for kind, path in outputs.items()}, inputs)
    choices = {"boxes": boxes, "clicks": clicks, "points_per_side": points_per_side, "seed": seed}
    shares = {"resamples": resamples, "max_broken": max_broken, "strict": strict}
    found = api.evaluate(model, data, protocol, **choices, **shares, distributed=distributed, engine=engine)
    from slimsam_jax import sharding

    if sharding.is_main():
        write(found.measure_costs() if costs else found, outputs)
    sharding.barrier("evaluation written")


def write(found: Evaluation, outputs: dict[str, Path | None]) -> None:
    """Prints the table and writes the outputs, {kind: path}, that are asked for."""
    found.print_table()  # before anything is written, which may fail
    saves = {"json": found.save_json, "markdown": found.save_markdown, "figure": found.save_figure}
    wanted = {kind: path for kind, path in outputs.items() if path}
    for path in wanted.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    for kind, path in wanted.items():
        saves[kind](path)


def print_costs(models: tuple[Path, ...]) -> None:
    """Prints what models cost, which takes no images."""
    from slimsam_jax.evaluation import costs
    from slimsam_jax.evaluation.checks import check_choices, names_of

    check_choices(models, ["none"], (), None)
    costs.print_table(names_of(models), costs.measure([api.load(model) for model in models]))


if __name__ == "__main__":
    cli.run(main)
