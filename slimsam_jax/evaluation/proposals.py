"""Evaluates everything mode: which share of the annotated objects is among the first k masks.

As Segment Anything evaluates proposals (Kirillov et al. 2023, section 7.3, appendix D.3): no thresholds, box NMS 0.9,
ranked by the mean of predicted IoU and stability.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from slimsam_jax.data import Annotation
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.candidates import unpack
from slimsam_jax.inference.decode import Encoded
from slimsam_jax.inference.fast_sam import Found
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.models.kinds import Model

COUNTS = (10, 100, 1000)
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's


def proposal_scores(
    sam: Model, encoded: Encoded | Found, annotations: Sequence[Annotation], points_per_side: int
) -> dict[str, float]:
    """Scores an image: {"ar_10": average recall of its annotations by the first ten masks, ...}.

    A FastSAM's masks are those that it finds, whatever `points_per_side`.
    """
    truth = np.stack([a.mask for a in annotations])
    ious = [iou(mask[None], truth) for mask in proposals(sam, encoded, points_per_side)]
    return average_recall(np.array(ious).reshape(-1, len(truth)))


@functools.singledispatch
def proposals(sam: Model, encoded: Encoded | Found, points_per_side: int) -> Iterable[np.ndarray]:
    """At least as many masks [h, w] as `COUNTS` ask for, if there are, the best first."""
    generator = SamAutomaticMaskGenerator(
        sam, points_per_side, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=0.9
    )
    kept = generator.candidates(encoded)
    kept = kept.take(np.argsort(-(kept.predicted_iou + kept.stability), kind="stable")[: COUNTS[-1]])
    return (unpack(kept, i, encoded.original_size) for i in range(len(kept.bits)))


proposals.register(FastSam, lambda model, found, points_per_side: found.masks)


def average_recall(ious: np.ndarray) -> dict[str, float]:
    """Computes COCO's average recall at each of `COUNTS`, for one image.

    Args:
      ious: [masks, annotations], the best mask first.
    """
    ranks = np.stack([_matched(ious, threshold) for threshold in THRESHOLDS])
    return {f"ar_{count}": float((ranks < count).mean()) for count in COUNTS}


def _matched(ious: np.ndarray, threshold: float) -> np.ndarray:
    """Matches annotations with masks. Returns [annotations] the number of its mask, infinite of one without.

    Each mask takes the annotation that it overlaps most of those that no mask before it has taken.
    """
    ranks = np.full(ious.shape[1], np.inf)
    for rank, row in enumerate(ious):
        best = np.where(np.isinf(ranks), row, -1).argmax()
        if np.isinf(ranks[best]) and row[best] >= threshold:
            ranks[best] = rank
    return ranks
