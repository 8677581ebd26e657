"""The exported Hugging Face folder in the pipeline that finds all masks."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from converters import to_torch
from helpers.masks import brute_nms, matched
from slimsam_jax import SamAutomaticMaskGenerator, data, load

THRESHOLDS = {"pred_iou_thresh": 0.35, "stability_score_thresh": 0.55}  # of a weak SAM


def without_torchvision(monkeypatch, processor) -> None:
    """Gives the pipeline the one function of torchvision that it needs, which has no CPU build on PyPI."""

    def batched_nms(boxes, scores, idxs, iou_threshold):
        return torch.tensor(brute_nms(boxes.tolist(), scores.tolist(), iou_threshold), dtype=torch.long)

    for name in ("torchvision", "torchvision.ops", "torchvision.ops.boxes"):
        module = types.ModuleType(name)
        module.batched_nms = batched_nms
        monkeypatch.setitem(sys.modules, name, module)
    checked = type(processor).post_process_for_mask_generation
    monkeypatch.setattr(type(processor), checked.__name__, checked.__wrapped__)


@pytest.mark.slow  # importing transformers
def test_mask_generation_finds_the_masks_of_our_generator(tmp_path, monkeypatch):
    from transformers import pipeline

    to_torch.main(data.embedded_teacher(), tmp_path / "hf", "hf")
    found = pipeline("mask-generation", model=str(tmp_path / "hf"), device="cpu")
    if importlib.util.find_spec("torchvision") is None:
        without_torchvision(monkeypatch, found.image_processor)
    photo = Image.open(data.embedded_images() / "coffee.jpg").convert("RGB").crop((0, 0, 300, 200))
    masks = [{"segmentation": np.asarray(mask)} for mask in found(photo, points_per_crop=10, **THRESHOLDS)["masks"]]
    ours = SamAutomaticMaskGenerator(load(data.embedded_teacher()), 10, **THRESHOLDS).generate(photo)
    assert len(ours) > 3
    assert matched(masks, ours) >= 0.98 and matched(ours, masks) >= 0.98
