"""Masks and boxes compared one by one, in Python."""

from __future__ import annotations

import numpy as np

from slimsam_jax.imaging.overlap import iou


def brute_nms(boxes, scores, threshold):
    """Box by box, in Python: IoU in float32 and the threshold in float64, as torchvision on a CPU."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(box_iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def box_iou(one, other) -> float:
    sides = [max(0, min(one[2 + k], other[2 + k]) - max(one[k], other[k])) for k in (0, 1)]
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    shared_area = sides[0] * sides[1]
    union = area(one) + area(other) - shared_area
    return float(np.float32(shared_area) / np.float32(union)) if union else 0.0


def matched(found, wanted, least: float = 0.9) -> float:
    """Share of the masks of one list that have a partner in the other."""
    if not found:
        return 1.0
    best = lambda mask: max((float(iou(mask, other["segmentation"])) for other in wanted), default=0)
    return float(np.mean([best(each["segmentation"]) > least for each in found]))
