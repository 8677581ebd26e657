"""Finds all masks of many images. `python -m slimsam_jax.everything --model M --images D --out masks.json`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimsam_jax import cli, limits
from slimsam_jax.cli.checks import check_files, check_spared
from slimsam_jax.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slimsam_jax.data import Sample
    from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
    from slimsam_jax.inference.fast_sam_predictor import FastSamMaskGenerator
    from slimsam_jax.models.fast_sam import FastSam
    from slimsam_jax.models.sam import Sam

NOT_OF_A_SEARCH = ("model", "images", "out", "sheet", "distributed", "engine")


@dataclasses.dataclass(frozen=True)
class Options:
    """Find all masks of images and write them in COCO's format.

    A grid of points is asked; masks that the model itself thinks poor, or that change much with the threshold, are
    dropped, and so are duplicates. Of images that are files of their own it can be read again by `evaluate
    --data` and `data check`.
    """

    model: Path
    """A model folder, a .pth, or a Hugging Face SamModel or Sam2Model folder."""
    images: tuple[str, ...]
    """Folders of images, .tar shards, COCO .json files, tfds:DIR."""
    out: Path
    """The COCO .json to write."""
    sheet: Path | None = None
    """Also draw some of the images with their masks into this PNG."""
    points_per_side: int = 32
    """Points of the grid, a side."""
    points_per_batch: int = 64
    """Points that are decoded together."""
    pred_iou_thresh: float | None = None
    """The model's own estimate that a mask must exceed. Default: what the model brings along, else 0.88; a FastSAM's
    confidence 0.4."""
    stability_score_thresh: float | None = None
    """The lowest stability of a mask. Default: what the model brings along, else 0.95."""
    box_nms_thresh: float | None = None
    """Box IoU from which the worse of two masks is a duplicate. Default: 0.7, of a FastSAM 0.9."""
    crop_n_layers: int = 0
    """1: also in 4 overlapping crops, 2: and in 16."""
    crop_n_points_downscale_factor: int = 1
    """By which the points per side fall from layer to layer of crops."""
    min_mask_region_area: int = 0
    """Holes and islands of fewer pixels are filled and dropped."""
    hierarchical: bool = False
    """Ask few points first, then those around the best masks: takes less time, and misses some masks."""
    covered_thresh: float | None = None
    """With --hierarchical, TinySAM's way instead: the logit over which a mask covers other points; theirs is 8.5."""
    postprocessing: Literal["fast_sam", "ultralytics"] = "fast_sam"
    """Of a FastSAM: boxes and masks as the original makes them, or as ultralytics 8.4 does."""
    engine: Literal["auto", "jax", "onnxruntime"] = "auto"
    """What computes the image encoder. onnxruntime exports it once into the user's cache folder; "auto" takes it for a
    model for which that was done on this machine, and measured faster than JAX."""
    distributed: str | None = None
    """For several processes, each with the same arguments, which share the images and of which the first writes: "auto"
    on TPU pods and under SLURM or MPI; or HOST:PORT,PROCESSES,INDEX, where HOST:PORT is a free port of process 0."""


def everything(options: Options) -> None:
    """Searches every image; those that cannot be read are named and left out.

    Raises:
      InputError: bad options or files, or not one image could be read.
    """
    check_files([path for path in (options.out, options.sheet) if path])
    outputs = {"--out": options.out, "--sheet": options.sheet}
    check_spared(outputs, {"--images": options.images, "--model": [options.model]})
    limits.check_options(options, {name: r for name, r in limits.SEARCH.items() if hasattr(options, name)})
    from converters.from_torch import load
    from converters.onnx.engine import engaged
    from slimsam_jax.data import find
    from slimsam_jax.data.together import map_together
    from slimsam_jax.sharding import barrier, is_main, join_processes

    if options.distributed:
        join_processes(options.distributed, preemption=False)
    samples, generator = find(options.images), generator_of(engaged(load(options.model), options.engine), options)
    results, skipped = map_together(lambda sample: search(generator, sample), samples, "everything")
    if not results:
        raise InputError(
            f"not one of the {len(samples)} images can be read; the last: {next(reversed(skipped.values()))}"
        )
    if is_main():
        write(options, generator, results, skipped)
    barrier("everything written")


def write(
    options: Options,
    generator: SamAutomaticMaskGenerator | FastSamMaskGenerator,
    results: dict[Sample, dict[str, Any]],
    skipped: dict[str, str],
) -> None:
    """Writes the results and says what is in them, and what is not, {name: reason}."""
    from slimsam_jax.files import write_json

    for reason in skipped.values():
        print(f"skipped: {reason}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = as_coco(results)
    write_json(options.out, content)
    print(f"wrote {options.out}: {len(content['annotations'])} masks of {len(results)} images")
    if not content["annotations"]:
        print(why_nothing(generator, list(results)))
    if options.sheet:
        draw(results, options.sheet)


def generator_of(model: Sam | FastSam, options: Options) -> SamAutomaticMaskGenerator | FastSamMaskGenerator:
    """The generator of a model's kind.

    Raises:
      InputError: an option of SAM's grid of points, and the model is a FastSAM, which asks none; or of a FastSAM, and
        it is a SAM.
    """
    from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
    from slimsam_jax.inference.fast_sam_predictor import FastSamMaskGenerator
    from slimsam_jax.models.fast_sam import FastSam

    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in NOT_OF_A_SEARCH}
    if not isinstance(model, FastSam):
        if fields.pop("postprocessing") != "fast_sam":
            raise InputError(f"--postprocessing is of a FastSAM, and {options.model} is a SAM")
        fields["box_nms_thresh"] = 0.7 if options.box_nms_thresh is None else options.box_nms_thresh
        return SamAutomaticMaskGenerator(model, output_mode="coco_rle", **fields)
    from slimsam_jax.inference.fast_sam import Options as How

    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    known = {"conf": fields.pop("pred_iou_thresh"), "iou": fields.pop("box_nms_thresh")}
    known["postprocessing"] = fields.pop("postprocessing")
    if others := [name for name, value in fields.items() if value != defaults[name]]:
        raise InputError(
            f"--{others[0].replace('_', '-')} is of SAM's grid of points, and {options.model} is a FastSAM"
        )
    how = How(**{name: value for name, value in known.items() if value is not None})
    return FastSamMaskGenerator(model, how, output_mode="coco_rle")


def why_nothing(generator: SamAutomaticMaskGenerator | FastSamMaskGenerator, samples: Sequence[Sample]) -> str:
    """Explains why readable samples gave no mask: the best scores, and which option to lower how far."""
    from slimsam_jax.inference import calibration
    from slimsam_jax.inference.fast_sam_predictor import FastSamMaskGenerator

    if isinstance(generator, FastSamMaskGenerator):
        conf = generator.predictor.options.conf
        return f"no mask was kept: nothing is detected with a confidence above {conf:.2f}; lower --pred-iou-thresh"

    scores = calibration.scores(generator.model, samples, generator.stability_score_offset)
    asked = f"{len(scores.stability)} masks at {calibration.GRID} x {calibration.GRID} points"
    if scores.passing(generator).any():
        return f"no mask was kept, though of {asked} some pass: raise --points-per-side"
    lower = calibration.fitting(scores, calibration.USUAL)
    best, options = [], []
    first = "stability of its logits" if generator.use_stability_score else "predicted IoU"
    for name, words, values in zip(calibration.NAMES, (first, "stability"), scores, strict=True):
        option, threshold = f"--{name.replace('_', '-')}", getattr(generator, name)
        best.append(f"the best {words} is {values.max():.2f} ({option} is {threshold:.2f})")
        if getattr(lower, name) < threshold:
            options.append(f"{option} {getattr(lower, name):.2f}")
    hint = "" if generator.model.thresholds else f"; {cli.called('calibrate')} gives the model thresholds of its own"
    return f"no mask was kept. Of {asked} {' and '.join(best)}: lower to, say, {' '.join(options)}{hint}"


def search(generator: SamAutomaticMaskGenerator | FastSamMaskGenerator, sample: Sample) -> dict[str, Any]:
    """Finds the masks of a sample: {"size": (height, width), "masks": records}."""
    image = sample.image()
    return {"size": (image.height, image.width), "masks": generator.generate(image)}


def as_coco(results: dict[Sample, dict[str, Any]]) -> dict[str, Any]:
    """Converts {sample: result of `search`} to COCO: images and annotations numbered from 1, one category."""
    images, annotations = [], []
    for number, (sample, result) in enumerate(results.items(), 1):
        height, width = result["size"]
        images.append({"id": number, "file_name": str(Path(sample.name).absolute()), "height": height, "width": width})
        for record in result["masks"]:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotations.append({**ids, **record})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


def draw(results: dict[Sample, dict[str, Any]], out: Path) -> None:
    """Draws images with their masks."""
    from slimsam_jax.data.check import draw_sheet
    from slimsam_jax.files import replacing

    labelled = [dataclasses.replace(s, load_annotations=lambda r=result: r["masks"]) for s, result in results.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        draw_sheet(labelled, prompts=False).save(temporary, format="PNG")
    print(f"drawn in {out}")


if __name__ == "__main__":
    cli.run(Options, everything)
