"""SAM 2 through the doors that SAM goes through: its own frame, prompts of all kinds, everything mode, evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from converters.from_torch import from_state_dict
from helpers import golden_sam2 as golden_file
from helpers.family_models import SMALL_HIERA, sam2
from helpers.images import random_image
from helpers.models import SQUARE, random_sam
from helpers.shared import shared
from slimsam_jax import api
from slimsam_jax.compression import analysis
from slimsam_jax.data import Annotation
from slimsam_jax.evaluation import clicks
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.decode import Encoded
from slimsam_jax.inference.predictor import Prompt, SamPredictor
from slimsam_jax.models.config import Thresholds


@pytest.fixture(scope="module")
def whole():
    with np.load(shared("golden/sam2_image.npz")) as arrays:
        return dict(arrays)


def prompts_of(whole) -> dict[tuple[str, int | None], Prompt]:
    """{(case, its place in a batch): the prompt in pixels of the image}."""
    given = lambda name: whole[f"prompt/{name}"]
    points, mask = (given("points3"), given("labels3")), given("mask_input")
    found = {
        ("point1", None): Prompt(given("point1"), given("label1")),
        ("points3", None): Prompt(*points),
        ("box", None): Prompt(box=given("box")),
        ("box_point", None): Prompt(given("point1"), given("label1"), given("box")),
        ("mask", None): Prompt(mask_input=mask),
        ("point1_mask", None): Prompt(given("point1"), given("label1"), mask_input=mask),
    }
    for i in range(2):
        found["batch2_points", i] = Prompt(given("batch2_points")[i], given("batch2_labels")[i])
        found["boxes2", i] = Prompt(box=given("boxes2")[i])
    return found


def test_every_case_of_the_original(whole):
    """From the image's pixels to masks of its size; mixed kinds of prompts in one call."""
    given = golden_file.given_of(golden_file.config_of(whole))
    predictor, cases = SamPredictor(from_state_dict(golden_file.state_of(whole), **given)), prompts_of(whole)
    assert predictor.model.thresholds == Thresholds(pred_iou_thresh=0.8)
    predictor.set_image(whole["image_uint8"])
    np.testing.assert_allclose(predictor.get_image_embedding(), whole["image_embedding"], atol=1e-4)
    image, listed = [whole["image_uint8"]], [list(cases.values())]
    for several, kind in ((True, "multi"), (False, "single")):
        (found,) = predictor.predict_batch(image, listed, several, return_logits=True)
        for (case, place), ours in zip(cases, found, strict=True):
            pick = lambda name, case=case, place=place, kind=kind: whole[f"{case}/{kind}/{name}"][
                place or 0 if place is not None else ...
            ]
            np.testing.assert_allclose(ours.iou_predictions, pick("scores"), atol=1e-5, err_msg=case)
            np.testing.assert_allclose(ours.masks, pick("mask_logits"), atol=1e-3, err_msg=case)
            if f"{case}/{kind}/low_res_clamped" in whole:
                np.testing.assert_allclose(ours.low_res_masks, pick("low_res_clamped"), atol=1e-3, err_msg=case)
    assert max(np.abs(ours.masks).max() for ours in found) > 32  # what is given back is clamped, masks are not


@pytest.fixture(scope="module")
def small():
    return dataclasses.replace(sam2(SMALL_HIERA), thresholds=Thresholds(0.0, 0.0, 0.5))


def test_everything_gives_the_masks_of_its_points(small):
    predictor, image = SamPredictor(small), random_image(0, 20, 31)
    predictor.set_image(image)
    found = SamAutomaticMaskGenerator(small, points_per_side=2, box_nms_thresh=1.0).generate(image)
    assert found
    expected = {tuple(p): predictor.predict([p]) for p in {tuple(record["point_coords"][0]) for record in found}}
    for record in found:
        masks = expected[tuple(record["point_coords"][0])].masks
        different = (masks != record["segmentation"]).mean(axis=(1, 2))
        assert different.min() < 0.005  # a pixel whose logit is nearly 0


@pytest.mark.parametrize(("kind", "largest"), [("sam2", 32), ("sam", 50)])
def test_clicks_give_back_the_logits_that_a_predictor_does(small, monkeypatch, kind, largest):
    """SAM 2's within 32; masks are made of those that are not clipped. Nothing is compiled."""
    low, seen = np.full((1, 1, 16, 16), -50.0), []
    low[..., :8] = 50
    monkeypatch.setattr(
        clicks, "decode_prompts", lambda sam, encoded, prompts, masks: (seen.append(masks) or low, None)
    )
    sam, encoded = small if kind == "sam2" else random_sam(SQUARE), Encoded(None, (64, 64), (64, 64))
    made = lambda sam, encoded, low: np.abs(low).max() == 50 and low.repeat(4, 1).repeat(4, 2) > 0
    monkeypatch.setattr(clicks, "original_masks", made)
    truth = np.zeros((64, 64), bool)
    truth[:20] = True
    ious = clicks.click_ious(sam, encoded, [Annotation(0, truth, *np.zeros((3, 4)))], 3)
    assert (ious == (20 * 32) / (64 * 32 + 20 * 32)).all() and seen[0] is None
    assert [np.abs(masks).max() for masks in seen[1:]] == [largest] * 2


def test_it_is_evaluated_and_inspected(small, material, capsys):
    summary = api.evaluate([small], material / "val", ["point", "box", "clicks"], resamples=10).summary
    assert all(0 <= summary[name][0]["mean"] <= 1 for name in ("point/iou", "box/iou"))
    analysis.print_parts(small)
    said = capsys.readouterr().out
    assert "pos_embed_window" in said and "G MACs (attention" in said
    height, width = small.config.image_size
    assert f"{height} x {width} pixels" in said
