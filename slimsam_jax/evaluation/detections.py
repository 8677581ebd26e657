"""A detector's boxes as prompts: COCO AP, as SAM, TinySAM, MobileSAM and EfficientSAM report it.

The boxes and their scores are the detector's, the masks ours; `pycocotools` compares them with the ground truth.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slimsam_jax import rle
from slimsam_jax.data import read_image
from slimsam_jax.errors import InputError, blaming
from slimsam_jax.evaluation.masks import Encoded, Prompts, decode_prompts, encode_image, original_masks
from slimsam_jax.evaluation.reading import map_readable
from slimsam_jax.models.prompt_encoder import prompt_points
from slimsam_jax.models.sam import Sam
from slimsam_jax.progress import track

MEASURES = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")  # the first of COCOeval.stats, in its order
CHOICES = ("", "_best")  # the single mask, and the best of the others by predicted IoU, which TinySAM takes

Results = list[dict[str, Any]]  # in the format of COCO's results


class Detection(NamedTuple):
    """A box found by a detector: x0, y0, x1, y1 in the image's own pixels."""

    box: np.ndarray
    category: int
    score: float


def read_detections(path: Path) -> dict[int | str, list[Detection]]:
    """{image id: boxes} of a file in COCO's results format.

    Raises:
      InputError: it is not one.
    """
    found: dict[int | str, list[Detection]] = {}
    with blaming(f"the file of boxes {path}"):
        for fields in json.loads(Path(path).read_text()):
            x, y, width, height = (float(number) for number in fields["bbox"])
            score = float(fields["score"])
            if not (np.isfinite([x, y, width, height, score]).all() and width >= 0 and height >= 0):
                raise ValueError("a box or score that is none")
            box = np.array([x, y, x + width, y + height])
            found.setdefault(fields["image_id"], []).append(Detection(box, fields["category_id"], score))
    return found


def read_truth(path: Path) -> Any:
    """The ground truth in COCO's format, as pycocotools has it.

    Raises:
      InputError: it is not one, or pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise InputError("--boxes needs pycocotools: pip install 'slimsam_jax[coco]'") from None
    with blaming(f"the COCO annotations {path}"), contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        if not truth.imgs or not truth.cats:
            raise ValueError("it has no images or no categories")
        return truth


def measure_boxes(
    sams: Sequence[Sam], boxes: Path, annotations: Path, folders: Sequence[Path]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """AP of each model's masks for a detector's boxes, over those images of the ground truth that are in the folders.

    Returns:
      {"boxes/ap": per model {"mean", "images"} and after the first "difference"}, ... as `statistics.summarise`; and
      {image: why it was left out}.

    Raises:
      InputError: a file cannot be read, or they do not fit one another.
    """
    truth, detections = read_truth(annotations), read_detections(boxes)
    if not set(detections) & set(truth.imgs):
        raise InputError(f"no box in {boxes} is of an image in {annotations}: their image ids differ")
    paths = _files(truth, folders)
    found, skipped = map_readable(
        lambda path: _segment(sams, path, paths[path], detections.get(paths[path], [])), track(list(paths), "boxes")
    )
    ids = [paths[path] for path in found]
    if not any(results for each in found.values() for model in each for results in model.values()):
        reason = next(iter(skipped.values()), f"no image in {', '.join(map(str, folders))} has a box in {boxes}")
        raise InputError(f"no box can be measured on: {reason}")
    summary: dict[str, list[dict[str, Any]]] = {}
    for choice in CHOICES:
        for model in range(len(sams)):
            results = [result for each in found.values() for result in each[model][choice]]
            for measure, value in average_precision(truth, results, ids).items():
                row = summary.setdefault(f"boxes/{measure}{choice}", [])
                row.append({"mean": value, "images": len(ids)} | ({"difference": value - row[0]["mean"]} if row else {}))
    return summary, skipped


def _files(truth: Any, folders: Sequence[Path]) -> dict[Path, int | str]:
    """{file: image id} of the images that lie in the folders."""
    found = {}
    for image_id, fields in sorted(truth.imgs.items(), key=lambda item: str(item[0])):
        places = [Path(folder) / fields.get("file_name", "") for folder in folders]
        found |= {path: image_id for path in places if path.is_file()}
    if not found:
        raise InputError(f"none of the {len(truth.imgs)} images of the annotations is in {', '.join(map(str, folders))}")
    return found


def _segment(
    sams: Sequence[Sam], path: Path, image_id: int | str, detections: Sequence[Detection]
) -> list[dict[str, Results]]:
    """Each model's masks of one image's boxes, {choice: results}."""
    image = read_image(path)
    if not detections:
        return [{choice: [] for choice in CHOICES} for _ in sams]
    return [segment(sam, encode_image(sam, image), image_id, detections) for sam in sams]


def segment(
    sam: Sam, encoded: Encoded, image_id: int | str, detections: Sequence[Detection]
) -> dict[str, Results]:
    """One model's masks of one image's boxes, {choice: results}."""
    prompts = Prompts(*prompt_points(boxes=np.stack([detection.box for detection in detections])))
    low, predicted = decode_prompts(sam, encoded, prompts)
    found: dict[str, Results] = {choice: [] for choice in CHOICES}
    for detection, logits, scores in zip(detections, low, predicted, strict=True):
        for choice, output in zip(CHOICES, (0, 1 + scores[1:].argmax()), strict=True):
            mask = rle.encode(original_masks(sam, encoded, logits[output]))
            found[choice].append(
                {
                    "image_id": image_id,
                    "category_id": detection.category,
                    "score": detection.score,
                    "segmentation": mask,
                }
            )
    return found


def average_precision(truth: Any, results: Results, image_ids: Sequence[int | str]) -> dict[str, float]:
    """{"ap": ..., ...} of masks by COCO's rules; without sizes of which the ground truth has none."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(MEASURES, evaluation.stats, strict=False) if value >= 0}
