"""Measures models on annotated images. `python -m slimsam_jax.evaluate --model A B --data D`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimsam_jax import cli, limits
from slimsam_jax.cli.checks import check_files, check_seed, check_share
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Sam

Protocol = Literal["point", "point-center", "box", "box-noisy", "clicks", "everything", "agreement"]


def main(
    model: tuple[Path, ...],
    data: tuple[str, ...],
    protocol: tuple[Protocol, ...] = (),
    boxes: Path | None = None,
    clicks: int = 10,
    points_per_side: int = 32,
    seed: int = 0,
    resamples: int = 10_000,
    max_broken: float = 0.1,
    strict: bool = False,
    json: Path | None = None,
    markdown: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Measure SAMs on the same images, and how much they differ.

    Each annotation of an image gives one prompt; the mask is compared with it at the image's own size. Mean over
    annotations, then over images. Intervals are 95 % bootstrap intervals over images; of all models but the first
    they are of the difference to the first, paired by image.

    Args:
      model: model folders, .pth files, or Hugging Face SamModel folders.
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
      json: write all numbers, per image too, with the hashes of models and data.
      markdown: write the table.
      figure: write a PNG: each image's score of one model against the first's, and masks of the worst images.
    """
    if not protocol and not boxes:
        protocol = ("point", "box")
    _check(model, data, protocol, boxes, figure)
    _check_numbers(clicks, points_per_side, seed, resamples)
    check_share(max_broken)
    outputs = [path for path in (json, markdown, figure) if path]
    check_files(outputs)
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    from converters.from_torch import load
    from slimsam_jax.checkpoint import sha256
    from slimsam_jax.data import find
    from slimsam_jax.data.sources import coco
    from slimsam_jax.evaluation import Protocols, bootstrap, detections, figures, measure_models, tables
    from slimsam_jax.files import write_json

    names, samples = _names(model), find(data)
    detected = detections.read_boxes(boxes) if boxes else None
    truth = detections.read_truth(coco.file_of(data[0]), detected) if boxes else None
    sams = [load(path) for path in model]
    protocols = Protocols(tuple(dict.fromkeys(protocol)), clicks=clicks, points_per_side=points_per_side, seed=seed)
    measured = measure_models(sams, samples, protocols, detected, 0.0 if strict else max_broken)
    summary = bootstrap.summarise(list(measured.scores.values()), seed, resamples)
    if boxes:
        ids = [sample.image_id for sample in measured.samples.values()]
        summary |= detections.precisions(truth, list(measured.results.values()), ids, seed, resamples)
    for reason in measured.skipped.values():
        print(f"skipped: {reason}")
    tables.print_table(names, summary)
    print(f"{len(measured.samples)} images")
    if missing := [name for name in protocols.names if not any(key.startswith(f"{name}/") for key in summary)]:
        print(f"not measured, as none of the images is annotated: {', '.join(missing)}")
    if json:
        made_by = {"models": _described(names, model, sams), "boxes": boxes and sha256(boxes), "resamples": resamples}
        write_json(json, made_by | tables.as_json(names, measured, protocols, summary))
    if markdown:
        tables.write_markdown(markdown, names, summary)
    if figure:
        figures.draw(names, sams, measured, protocols, figure)


def _check(
    model: Sequence[Path], data: Sequence[str], protocol: Sequence[str], boxes: Path | None, figure: Path | None
) -> None:
    """Raises InputError for what does not go together."""
    for name, values in (("--model", model), ("--data", data)):
        if not values:
            raise InputError(f"{name} needs at least one value")
    if len(set(model)) < len(model):
        raise InputError("--model has a model twice")
    if "agreement" in protocol and len(model) < 2:
        raise InputError("--protocol agreement needs at least two models: it compares with the first")
    if boxes and (len(data) > 1 or not _is_coco(data[0])):
        raise InputError("--boxes needs one COCO .json as --data, or a folder with annotations.json: the ground truth")
    if figure and not protocol:
        raise InputError("--figure needs a --protocol: AP has no score per image to draw")


def _is_coco(location: str) -> bool:
    """Tells COCO by its name; what is in it is seen when it is read."""
    from slimsam_jax.data.sources import coco

    path = coco.file_of(location)
    return path.suffix == ".json" and (path.is_file() or path == Path(location).expanduser())


def _check_numbers(clicks: int, points_per_side: int, seed: int, resamples: int) -> None:
    limits.check("--clicks", clicks, Range(1, limits.PROMPT_POINTS - 1, True))  # and one point that ends them
    limits.check("--points-per-side", points_per_side, limits.SEARCH["points_per_side"])
    limits.check("--resamples", resamples, Range(1, 10**6, True))
    check_seed(seed)


def _described(names: Sequence[str], paths: Sequence[Path], sams: Sequence[Sam]) -> dict[str, dict[str, Any]]:
    from slimsam_jax.checkpoint import sha256

    return {
        name: {"path": str(path), "sha256": sha256(path), "provenance": sam.provenance}
        for name, path, sam in zip(names, paths, sams, strict=True)
    }


def _names(models: Sequence[Path]) -> list[str]:
    """Titles the columns: names of files or folders, or all of the paths where those are the same."""
    names = [path.name or str(path) for path in models]
    return names if len(set(names)) == len(names) else [str(path) for path in models]


if __name__ == "__main__":
    cli.run(main)
