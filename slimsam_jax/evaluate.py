"""How good models are on annotated images. `python -m slimsam_jax.evaluate --model A B --data D`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from slimsam_jax import cli
from slimsam_jax.errors import InputError

Protocol = Literal["point", "point-center", "box", "box-noisy", "clicks", "agreement"]


def main(
    model: tuple[Path, ...],
    data: tuple[Path, ...],
    protocol: tuple[Protocol, ...] | None = None,
    boxes: Path | None = None,
    annotations: Path | None = None,
    clicks: int = 10,
    seed: int = 0,
    resamples: int = 10_000,
    json: Path | None = None,
    markdown: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Measure SAMs on the same images, and how much they differ.

    Each annotation of an image gives one prompt; the mask is compared with it at the image's own size. Mean over
    annotations, then over images. Intervals are 95 % bootstrap intervals over images; of all models but the first
    also of the difference to the first, paired by image.

    Args:
      model: model folders, .pth files, or Hugging Face SamModel folders.
      data: folders of images with SA-1B .json files of the same names beside them.
      protocol: what a prompt is (default: point box, or with --boxes none): the annotation's own point (SlimSAM's protocol), the pixel deepest inside its mask, its box, its box
        with noise, clicks that correct the mask before, or agreement with the first model's masks for a grid of
        points, which needs no annotations.
      boxes: boxes of a detector as prompts, a file in COCO's results format: COCO AP (needs pycocotools).
      annotations: the ground truth for --boxes, in COCO's format; its images lie in --data.
      clicks: how many, for --protocol clicks.
      seed: of the noise on boxes and of the intervals.
      resamples: for the intervals.
      json: write all numbers, per image too, with the hashes of models and data.
      markdown: write the table.
      figure: write a PNG: each image's score of one model against the first's, and masks of the worst images.
    """
    if protocol is None:
        protocol = () if boxes else ("point", "box")
    _check(model, data, protocol, clicks, seed, resamples, (json, markdown, figure))
    _check_boxes(boxes, annotations, protocol, figure)
    from converters.from_torch import load
    from slimsam_jax.data import find_images
    from slimsam_jax.evaluation import Protocols, detections, figures, measure_models, statistics, tables

    names, sams = _names(model), [load(path) for path in model]
    protocols = Protocols(tuple(dict.fromkeys(protocol)), clicks=clicks, seed=seed)
    summary, skipped, measured = {}, {}, None
    if protocol:
        measured = measure_models(sams, find_images(data), protocols)
        summary, skipped = statistics.summarise(list(measured.scores.values()), seed, resamples), measured.skipped
    if boxes:
        found, left_out = detections.measure_boxes(sams, boxes, annotations, data)
        summary, skipped = summary | found, skipped | left_out
    for reason in skipped.values():
        print(f"skipped: {reason}")
    tables.print_table(names, summary)
    if json:
        tables.write_json(json, names, model, sams, measured, protocols, summary, resamples)
    if markdown:
        tables.write_markdown(markdown, names, summary)
    if figure:
        figures.draw(names, sams, measured, protocols, figure)


def _check(
    model: Sequence[Path],
    data: Sequence[Path],
    protocol: Sequence[str],
    clicks: int,
    seed: int,
    resamples: int,
    outputs: Sequence[Path | None],
) -> None:
    """Raises InputError for what cannot be measured, before anything heavy is imported."""
    for name, values in (("--model", model), ("--data", data)):
        if not values:
            raise InputError(f"{name} needs at least one value")
    if len(set(model)) < len(model):
        raise InputError("--model has a model twice")
    if "agreement" in protocol and len(model) < 2:
        raise InputError("--protocol agreement needs at least two models: it compares with the first")
    for name, value, least in (("--clicks", clicks, 1), ("--resamples", resamples, 1)):
        if value < least:
            raise InputError(f"{name} {value} must be at least {least}")
    cli.check_seed(seed)
    for path in outputs:
        if path:
            cli.check_file(path)


def _check_boxes(
    boxes: Path | None, annotations: Path | None, protocol: Sequence[str], figure: Path | None
) -> None:
    if (boxes is None) != (annotations is None):
        raise InputError("--boxes and --annotations (the ground truth, in COCO's format) need each other")
    if not boxes and not protocol:
        raise InputError("--protocol needs at least one value")
    if figure and not protocol:
        raise InputError("--figure needs a --protocol: AP has no score per image to draw")


def _names(models: Sequence[Path]) -> list[str]:
    """What the columns are called: names of files or folders, or all of the paths where those are the same."""
    names = [path.name or str(path) for path in models]
    return names if len(set(names)) == len(names) else [str(path) for path in models]


if __name__ == "__main__":
    cli.run(main)
