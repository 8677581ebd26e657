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
from slimsam_jax.data.sample import corners
from slimsam_jax.errors import InputError, blaming
from slimsam_jax.inference.masks import Encoded, Prompts, decode_prompts, original_masks
from slimsam_jax.models.prompt_encoder import prompt_points
from slimsam_jax.models.sam import Sam

MEASURES = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")  # the first of COCOeval.stats, in its order
CHOICES = ("", "_best")  # the single mask, and the best of the others by predicted IoU, which TinySAM takes


class Detection(NamedTuple):
    """A box found by a detector: x0, y0, x1, y1 in the image's own pixels."""

    box: np.ndarray
    category: int
    score: float


Boxes = dict[int, list[Detection]]  # by the images' COCO ids
Results = dict[str, list[dict[str, Any]]]  # masks in COCO's results format, for each of CHOICES


def read_boxes(path: Path) -> Boxes:
    """A file in COCO's results format.

    Raises:
      InputError: it is not one.
    """
    found: Boxes = {}
    with blaming(f"the file of boxes {path}"):
        for fields in json.loads(path.read_bytes()):
            detection = Detection(corners(fields["bbox"]), int(fields["category_id"]), float(fields["score"]))
            if not np.isfinite(detection.score):
                raise ValueError("a score that is none")
            found.setdefault(int(fields["image_id"]), []).append(detection)
    return found


def read_truth(path: Path, boxes: Boxes) -> Any:
    """The ground truth for the boxes, a COCO .json, as pycocotools has it.

    Raises:
      InputError: it is not one, or of other images; or pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise InputError("--boxes needs pycocotools: pip install 'slimsam_jax[coco]'") from None
    with blaming(f"the COCO file {path}"), contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(path.read_bytes())
        truth.dataset.setdefault("info", {})  # which some versions of pycocotools ask for
        truth.createIndex()
        for annotation in truth.anns.values():  # what may be left out elsewhere, and COCOeval reads
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", float(truth.annToMask(annotation).sum()))
    if not truth.cats or not truth.anns:
        raise InputError(f"{path} has no categories or no annotations to compare masks with")
    if not set(boxes) & set(truth.imgs):
        raise InputError(f"none of the boxes is of an image in {path}: the image ids differ")
    return truth


def segment(sam: Sam, encoded: Encoded, image_id: int, detections: Sequence[Detection]) -> Results:
    """One model's masks of one image's boxes."""
    found: Results = {choice: [] for choice in CHOICES}
    if not detections:
        return found
    prompts = Prompts(*prompt_points(boxes=np.stack([detection.box for detection in detections])))
    for detection, logits, scores in zip(detections, *decode_prompts(sam, encoded, prompts), strict=True):
        common = {"image_id": image_id, "category_id": detection.category, "score": detection.score}
        for choice, output in zip(CHOICES, (0, 1 + scores[1:].argmax()), strict=True):
            mask = original_masks(sam, encoded, logits[output])
            found[choice].append(common | {"segmentation": rle.encode(mask)})
    return found


def precisions(
    truth: Any, results: Sequence[Sequence[Results]], image_ids: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """AP of each model over some images: {"boxes/ap": per model {"mean", ...}, ...}, as `statistics.summarise`.

    There is no interval: AP is of all images together, and none of theirs.

    Args:
      results: of each image, by each model.

    Raises:
      InputError: no box is of one of the images.
    """
    if not any(model[CHOICES[0]] for image in results for model in image):
        raise InputError("none of the images that can be read has a box")
    summary: dict[str, list[dict[str, Any]]] = {}
    for choice in CHOICES:
        for model in zip(*results, strict=True):
            found = average_precision(truth, [mask for image in model for mask in image[choice]], image_ids)
            for measure, value in found.items():
                row = summary.setdefault(f"boxes/{measure}{choice}", [])
                difference = {"difference": value - row[0]["mean"]} if row else {}
                row.append({"mean": value, "images": len(image_ids)} | difference)
    return summary


def average_precision(truth: Any, results: list[dict[str, Any]], image_ids: Sequence[int]) -> dict[str, float]:
    """{"ap": ..., ...} of masks by COCO's rules; without sizes of which the ground truth has none."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(MEASURES, evaluation.stats, strict=False) if value >= 0}
