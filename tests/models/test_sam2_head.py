"""SAM 2's prompt encoder and decoder against its own code; and the rule by which a single mask gives way."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from converters.tables import hiera as table
from helpers import golden_families as families
from helpers import golden_sam2 as golden_file
from helpers.shared import shared
from slimsam_jax.imaging.prompts import ABSENT, prompt_points
from slimsam_jax.models import heads, sam, sam2_head
from slimsam_jax.models.composed import SamConfig

CASES = ("point1", "points3", "box", "box_point", "mask", "point1_mask", "batch2_points", "boxes2")
EMPTY = "mask_with_empty_point"  # what the video predictor makes of a mask alone


@pytest.fixture(scope="module")
def whole():
    with np.load(shared("golden/sam2_image.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(whole):
    return table.from_state_dict(golden_file.state_of(whole), **golden_file.given_of(golden_file.config_of(whole)))


def tokens(whole, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Points and labels of a case as `prompt_points` gives them: a box without the padding point."""
    if case == EMPTY:
        return np.zeros((1, 2, 2), np.float32), np.full((1, 2), -1)  # and its padding point
    if case == "mask":
        return prompt_points()
    points, labels = whole[f"{case}/model_frame_points"], whole[f"{case}/labels"]
    if not (labels == 2).any():
        return prompt_points(points, labels)
    clicks = labels[0] < 2
    given = (points[:, clicks], labels[:, clicks]) if clicks.any() else (None, None)
    return prompt_points(*given, points[:, ~clicks].reshape(-1, 4))


@pytest.fixture(scope="module")
def decoded(whole, model):
    """All cases as one batch, where tokens are missing to four absent: {case: its masks, IoU, score, tokens}."""
    parts, places, start = [], {}, 0
    for case in (*CASES, EMPTY):
        points, labels = tokens(whole, case)
        fill, count = ((0, 0), (0, 4 - labels.shape[1])), len(labels)
        masked = "mask" in case
        mask = np.zeros((count, 32, 32, 1), np.float32) + masked * whole["prompt/mask_input"][0][..., None]
        points = np.pad(points, (*fill, (0, 0)))
        parts.append((points, np.pad(labels, fill, constant_values=ABSENT), mask, np.full(count, masked)))
        places[case], start = slice(start, start + count), start + count
    names = {"embedding": "image_embedding", "high_res_1": "high_res/1", "high_res_0": "high_res/0"}
    maps = {ours: whole[theirs][0].transpose(1, 2, 0) for ours, theirs in names.items()}
    batch = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    outputs = sam2_head.run(model.head, model.params, maps, *batch)
    given = sam.decode(SamConfig(model.encoder, model.head), model.params, maps, *batch)
    return {case: [np.asarray(x)[place] for x in (*outputs, *given)] for case, place in places.items()}


@pytest.mark.parametrize("case", (*CASES, EMPTY))
def test_every_case(whole, model, decoded, case):
    """A box gets the padding point, too; what fills a batch up changes nothing; the single mask gives way as there."""
    low, iou, score, out, masks, scores = decoded[case]
    np.testing.assert_allclose(low, whole[f"{case}/all/low_res_masks"], atol=1e-3)
    np.testing.assert_allclose(iou, whole[f"{case}/all/iou_predictions"], atol=1e-5)
    if case == EMPTY:
        return
    np.testing.assert_allclose(score, whole[f"{case}/object_score_logits"][:, 0], atol=1e-4)
    np.testing.assert_allclose(out, whole[f"{case}/mask_tokens_out"], atol=1e-4)
    shape = (-1, *low.shape[1:])
    clamped = np.clip(masks, -sam2_head.LARGEST_LOW_RES, sam2_head.LARGEST_LOW_RES)
    for place, name in ((masks, "single"), (low, "single_plain")):
        wanted = whole[f"{case}/{name}/low_res_clamped"].reshape(len(low), 1, *shape[2:])
        np.testing.assert_allclose(np.clip(place[:, :1], -32, 32), wanted, atol=1e-3, err_msg=name)
    assert np.abs(clamped).max() <= 32
    np.testing.assert_allclose(scores[:, :1], whole[f"{case}/single/scores"].reshape(-1, 1), atol=1e-5)
    np.testing.assert_allclose(scores[:, 1:], whole[f"{case}/multi/scores"].reshape(-1, 3), atol=1e-5)
    logits = model.head.frame.resize_masks(masks, (128, 128), tuple(whole["original_size"]))
    for place, name in ((logits[:, :1], "single"), (logits[:, 1:], "multi")):
        wanted = whole[f"{case}/{name}/mask_logits"].reshape(place.shape)
        np.testing.assert_allclose(place, wanted, atol=1e-3, err_msg=name)


def test_points_in_the_model_frame(whole, model):
    size = tuple(whole["original_size"])
    for case in ("point1", "points3", "batch2_points"):
        points = whole[f"prompt/{case}"].reshape(whole[f"{case}/model_frame_points"].shape)
        ours = model.head.frame.points(points, (128, 128), size)
        np.testing.assert_allclose(ours, whole[f"{case}/model_frame_points"], atol=1e-4)


def test_an_unstable_mask_gives_way_to_the_best():
    """Among the rows is one whose mask is empty, which is stable."""
    arrays = families.read(golden_file.SUBSET)
    masks, ious = sam2_head.stable_first(arrays["stability/all_masks"], arrays["stability/all_ious"])
    np.testing.assert_array_equal(masks[:, :1], arrays["stability/masks"])
    np.testing.assert_array_equal(ious[:, :1], arrays["stability/ious"])
    np.testing.assert_array_equal(masks[:, 1:], arrays["stability/all_masks"][:, 1:])
    changed = (masks[:, 0] != arrays["stability/all_masks"][:, 0]).any((1, 2))
    assert 0 < changed.sum() < len(changed)


def test_architectures_are_json():
    head = sam2_head.HeadConfig((64, 96), out_chans=16, mask_in_chans=4, decoder_heads=2, iou_sigmoid=False)
    fields = json.loads(json.dumps(head.to_json()))
    assert sam2_head.from_json(fields) == head and heads.name_of(head) == "sam2"
    with pytest.raises(ValueError, match="not an architecture"):
        sam2_head.from_json({**fields, "depth": 3})


def test_an_encoder_of_one_map_does_not_fit():
    head = sam2_head.HeadConfig((64, 96), out_chans=16, mask_in_chans=4, decoder_heads=2)
    encoder = SimpleNamespace(image_size=head.image_size, grid=head.grid, out_chans=head.out_chans)
    with pytest.raises(ValueError, match="the encoder's embedding is of 1 scales, and the mask decoder takes 3"):
        SamConfig(encoder, head)


@pytest.mark.parametrize(
    "change",
    [
        {"out_chans": 20}, {"decoder_heads": 3}, {"mask_in_chans": 2}, {"decoder_depth": 33}, {"iou_sigmoid": 1},
        {"dynamic_multimask": None}, {"image_size": (60, 96)}, {"pixel_std": (0, 1, 1)}, {"multimask_outputs": 0},
    ],
)  # fmt: skip
def test_bounds(change):
    head = sam2_head.HeadConfig((64, 96), out_chans=16, mask_in_chans=4, decoder_heads=2)
    with pytest.raises(ValueError):
        dataclasses.replace(head, **change)
