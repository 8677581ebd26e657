"""Evaluates interactive segmentation: clicks that correct the mask, one after the other.

The first click is the interior point of the object; each further one that of what is wrong, on the object
where the mask misses some of it and as background where it covers too much (RITM, Sofiiuk et al. 2021). The decoder
gets all clicks so far and its previous mask, as in SAM; SAM 2's within the bounds of what its predictor gives back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimsam_jax.data import Annotation
from slimsam_jax.imaging.geometry import interior_point
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.imaging.prompts import ABSENT, NOT_A_POINT, Prompts
from slimsam_jax.inference.decode import Encoded, as_mask_input, decode_prompts, original_masks
from slimsam_jax.models.sam import Sam

TARGETS = (0.85, 0.9)  # IoU; the field's


def click_scores(sam: Sam, encoded: Encoded, annotations: Sequence[Annotation], clicks: int) -> dict[str, float]:
    """Scores an image, means over annotations: {"iou_1": IoU after the first click, ..., "noc_85": clicks to it, ...}.

    A target that is never reached counts as `clicks`.
    """
    ious = click_ious(sam, encoded, annotations, clicks)
    means = {f"iou_{k + 1}": float(ious[:, k].mean()) for k in range(clicks)}
    return means | {f"noc_{round(100 * target)}": float(clicks_to(ious, target).mean()) for target in TARGETS}


def clicks_to(ious: np.ndarray, target: float) -> np.ndarray:
    """Counts the clicks until the target is first reached, or all: [p, clicks] IoU after each click -> [p]."""
    reached = ious >= target
    return np.where(reached.any(1), reached.argmax(1) + 1.0, ious.shape[1])


def click_ious(sam: Sam, encoded: Encoded, annotations: Sequence[Annotation], clicks: int) -> np.ndarray:
    """Computes the IoU of the single mask after each click, [p, clicks].

    All annotations advance together; a mask without a fault stays as it is.
    """
    truth = [a.mask for a in annotations]
    prompts = _no_clicks(len(truth), clicks)
    masks, low, ious = [np.zeros_like(mask) for mask in truth], None, np.zeros((len(truth), clicks))
    for k in range(clicks):
        open_ = [_add_click(prompts, i, k, masks[i], truth[i]) for i in range(len(truth))]
        new, _ = decode_prompts(sam, encoded, prompts, None if low is None else as_mask_input(sam, low))
        changed = np.array(open_).reshape(-1, *[1] * (new.ndim - 2))  # logits, or choices of a FastSAM
        low = new[:, 0] if low is None else np.where(changed, new[:, 0], low)
        masks = list(original_masks(sam, encoded, low))
        ious[:, k] = [iou(mask, true) for mask, true in zip(masks, truth, strict=True)]
    return ious


def _no_clicks(count: int, clicks: int) -> Prompts:
    """Makes prompts with room for all clicks: one shape, and so one compilation, for any number of them."""
    labels = np.full((count, clicks + 1), ABSENT, np.int32)
    labels[:, -1] = NOT_A_POINT  # the original ends clicks without a box so
    return Prompts(np.zeros((count, clicks + 1, 2)), labels)


def _add_click(prompts: Prompts, i: int, k: int, mask: np.ndarray, truth: np.ndarray) -> bool:
    """Puts the k-th click of prompt i where its mask is most wrong; False if it is wrong nowhere."""
    taken = prompts.points[i, :k]
    (missed, depth), (surplus, other) = interior_point(truth & ~mask, taken), interior_point(mask & ~truth, taken)
    if max(depth, other) == 0:
        return False
    prompts.points[i, k] = missed if depth >= other else surplus
    prompts.labels[i, k] = 1 if depth >= other else 0
    return True
