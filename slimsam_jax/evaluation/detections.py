"""Evaluates masks of a detector's boxes: COCO AP, as SAM, TinySAM, MobileSAM and EfficientSAM report it.

The boxes and their scores are the detector's, the masks ours; `pycocotools` compares them with the ground truth.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slimsam_jax.data.sample import corners
from slimsam_jax.data.sources import coco
from slimsam_jax.errors import InputError, reading
from slimsam_jax.evaluation.resampled_ap import RESAMPLES, categories, intervals
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.prompts import Prompts, prompt_points
from slimsam_jax.inference.decode import Encoded, decode_prompts, original_masks
from slimsam_jax.inference.ranking import ranking
from slimsam_jax.models.sam import Sam

MEASURES = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")  # the first of COCOeval.stats, in its order
FARTHEST = 1e6  # pixels: a box beyond is of no image
MOST_BOXES = 10_000  # of one image; each takes a megabyte
CHOICES = ("", "_best")  # the single mask, and the best of the others by predicted IoU, which TinySAM takes


class Detection(NamedTuple):
    """A box of a detector: x0, y0, x1, y1 in the image's own pixels."""

    box: np.ndarray
    category: int
    score: float


Boxes = dict[int, list[Detection]]  # by the images' COCO ids
Results = dict[str, list[dict[str, Any]]]  # masks in COCO's results format, for each of CHOICES


def read_boxes(path: Path) -> Boxes:
    """Reads boxes from a file in COCO's results format.

    Raises:
      InputError: it is not one.
    """
    boxes: Boxes = {}
    with reading(f"the file of boxes {path}"):
        for fields in coco.read(path):
            detection = Detection(corners(fields["bbox"]), int(fields["category_id"]), float(fields["score"]))
            if not np.isfinite(detection.score) or np.abs(detection.box).max() > FARTHEST:
                raise ValueError("a score that is none, or a box that is of no image")
            of_image = boxes.setdefault(int(fields["image_id"]), [])
            of_image.append(detection)
            if len(of_image) > MOST_BOXES:
                raise ValueError(f"more than {MOST_BOXES} boxes of one image; COCO counts the best 100 of a category")
    return boxes


def read_truth(path: Path, boxes: Boxes) -> Any:
    """Reads the ground truth for the boxes, a COCO .json, into pycocotools.

    Raises:
      InputError: it is not one, or of other images; or pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise InputError("--boxes needs pycocotools: pip install 'slimsam_jax[coco]'") from None
    with reading(f"the COCO file {path}"), contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco.read(path)
        truth.dataset.setdefault("info", {})  # which some versions of pycocotools ask for
        for number, annotation in enumerate(truth.dataset.get("annotations", ()), 1):
            annotation["id"] = number  # by which pycocotools notes a match: 0 is none to it, and two of one id are one
        truth.createIndex()
        if not all(type(number) is int for number in truth.imgs):
            raise ValueError("an image id that is no integer")
        for annotation in truth.anns.values():
            _make_sound(annotation, truth.imgs[annotation["image_id"]])
    if not _has_object(truth, truth.imgs):
        raise InputError(f"{path} has no object of a category to compare masks with; crowds are none")
    if not set(boxes) & set(truth.imgs):
        raise InputError(f"none of the boxes is of an image in {path}: the image ids differ")
    return truth


def _has_object(truth: Any, image_ids: Iterable[int]) -> bool:
    """Whether COCOeval has anything to count in some images: an object of a category, and no crowd."""
    annotations = (annotation for number in image_ids for annotation in truth.imgToAnns.get(number, ()))
    return any(annotation["category_id"] in truth.cats and not annotation["iscrowd"] for annotation in annotations)


def _make_sound(annotation: dict[str, Any], image: dict[str, Any]) -> None:
    """Checks what pycocotools trusts, and adds what may be left out elsewhere and COCOeval reads."""
    size = coco.size_of(image)
    annotation["segmentation"] = mask = coco.as_rle(annotation["segmentation"], size)
    annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
    annotation["area"] = float(annotation.get("area", rle.run_lengths(mask, size)[1::2].sum()))
    if not np.isfinite(annotation["area"]):
        raise ValueError("an area that is none")
    if isinstance(mask["counts"], list):  # which pycocotools takes in one place and not in others
        annotation["segmentation"] = rle.encode(rle.decode(mask, size))


def segment(sam: Sam, encoded: Encoded, image_id: int, detections: Sequence[Detection]) -> Results:
    """Predicts one model's masks of one image's boxes."""
    results: Results = {choice: [] for choice in CHOICES}
    if not detections:
        return results
    prompts = Prompts(*prompt_points(boxes=np.stack([detection.box for detection in detections])))
    for detection, logits, scores in zip(detections, *decode_prompts(sam, encoded, prompts), strict=True):
        common = {"image_id": image_id, "category_id": detection.category, "score": detection.score}
        best = 1 + ranking(sam, logits, scores)[1:].argmax()
        for choice, output in zip(CHOICES, (0, best), strict=True):
            mask = original_masks(sam, encoded, logits[output])
            results[choice].append(common | {"segmentation": rle.encode(mask)})
    return results


def precisions(
    truth: Any,
    results: Sequence[Sequence[Results]],
    image_ids: Sequence[int],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, list[dict[str, Any]]]:
    """Computes AP of each model over some images: {"boxes/ap": per model {"mean", ...}, ...}, as `bootstrap.summarise`.

    Only of AP itself there are intervals, see `resampled_ap`.

    Args:
      results: of each image, by each model.

    Raises:
      InputError: none of the images has a box, or an object.
    """
    if not any(model[CHOICES[0]] for image in results for model in image):
        raise InputError("none of the images that can be read has a box")
    if not _has_object(truth, image_ids):
        raise InputError("none of the images that can be read has an object to compare masks with")
    summary: dict[str, list[dict[str, Any]]] = {}
    for choice in CHOICES:
        models = [[mask for image in model for mask in image[choice]] for model in zip(*results, strict=True)]
        judged = [judge(truth, masks, image_ids) for masks in models]
        for evaluation in judged:
            for measure, value in measures(evaluation).items():
                row = summary.setdefault(f"boxes/{measure}{choice}", [])
                difference = {"difference": value - row[0]["mean"]} if row else {}
                row.append({"mean": value, "images": len(image_ids)} | difference)
        bounds = intervals([categories(evaluation) for evaluation in judged], len(set(image_ids)), seed, resamples)
        for model, own, difference in zip(summary.get(f"boxes/ap{choice}", []), *bounds.tolist(), strict=False):
            model |= {"interval": own} | ({"difference_interval": difference} if "difference" in model else {})
    return summary


def judge(truth: Any, results: list[dict[str, Any]], image_ids: Sequence[int]) -> Any:
    """Compares masks with the ground truth. Returns a `COCOeval`."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes([dict(mask) for mask in results]), "segm")  # which writes into them
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def measures(evaluation: Any) -> dict[str, float]:
    """Reads {"ap": ..., ...} off a `COCOeval`; without sizes of which the ground truth has none."""
    return {name: float(value) for name, value in zip(MEASURES, evaluation.stats, strict=False) if value >= 0}
