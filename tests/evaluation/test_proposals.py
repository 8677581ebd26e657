"""Average recall of everything mode, by hand and against pycocotools."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.models import SQUARE, random_sam
from slimsam_jax.data import Annotation
from slimsam_jax.evaluation.proposals import average_recall, proposal_scores
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.inference.decode import encode_image


def test_average_recall_by_hand():
    """Two annotations. The first mask overlaps both and takes the first; the eleventh is a perfect second."""
    ious = np.zeros((12, 2))
    ious[0] = 0.8, 0.7
    ious[10] = 0.9, 1.0
    found = average_recall(ious)
    assert found == pytest.approx({"ar_10": 7 / 20, "ar_100": 17 / 20, "ar_1000": 17 / 20})
    # A mask that overlaps most what is taken already has the best of the rest.
    found = average_recall(np.array([[0.92, 0.1], [0.8, 0.72]]))
    assert found["ar_10"] == pytest.approx((9 + 5) / 20)
    assert average_recall(np.zeros((0, 3))) == {"ar_10": 0, "ar_100": 0, "ar_1000": 0}


@pytest.mark.parametrize("seed", range(4))
def test_average_recall_equals_pycocotools(seed):
    random = np.random.default_rng(seed)

    def blobs(count):
        masks = np.zeros((count, 30, 40), bool)
        for mask in masks:
            (y, x), (h, w) = random.integers(0, 20, 2), random.integers(4, 12, 2)
            mask[y : y + h, x : x + w] = True
        return masks

    truth = blobs(6)
    masks = np.concatenate([np.roll(truth, 1, axis=2), blobs(30)])[random.permutation(36)]
    encode = lambda mask: pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))
    fields = lambda i, mask: {"id": i + 1, "image_id": 1, "category_id": 1, "segmentation": encode(mask)}
    ground = COCO()
    ground.dataset = {
        "images": [{"id": 1, "height": 30, "width": 40}],
        "categories": [{"id": 1}],
        "annotations": [
            fields(i, m) | {"area": int(m.sum()), "iscrowd": 0, "bbox": [0, 0, 1, 1]} for i, m in enumerate(truth)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        ground.createIndex()
        results = [fields(i, m) | {"score": 1 - i / 100} for i, m in enumerate(masks)]
        evaluation = COCOeval(ground, ground.loadRes(results), "segm")
        evaluation.params.useCats, evaluation.params.maxDets = 0, [1, 10, 100]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, 0, 1:].mean(0)  # [10 and 100 masks]
    found = average_recall(np.stack([iou(mask[None], truth) for mask in masks]))
    assert [found["ar_10"], found["ar_100"]] == pytest.approx(recall.tolist())
    assert 0 < found["ar_10"] < found["ar_100"]


def test_masks_that_the_model_makes_itself_are_all_recalled():
    sam = random_sam(SQUARE)
    encoded = encode_image(sam, Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)))
    from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
    from slimsam_jax.inference.candidates import unpack

    generator = SamAutomaticMaskGenerator(sam, 3, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=0.9)
    made = generator.candidates(encoded)
    masks = [unpack(made, i, (40, 60)) for i in range(len(made.bits))]
    zero = np.zeros(4)
    annotations = [Annotation(i, mask, zero, zero[:2], zero) for i, mask in enumerate(masks)]
    assert proposal_scores(sam, encoded, annotations, 3)["ar_1000"] == 1
    assert proposal_scores(sam, encoded, [annotations[0]._replace(mask=np.eye(40, 60, dtype=bool))], 3)["ar_1000"] == 0
