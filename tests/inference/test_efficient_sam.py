"""EfficientSAM through the doors that SAM goes through: its own frame and prompts, its own refusals."""

from __future__ import annotations

import numpy as np
import pytest

from converters.from_torch import from_state_dict
from helpers.family_models import efficient_sam
from helpers.images import random_image
from helpers.models import SQUARE, random_sam
from helpers.shared import shared
from slimsam_jax import api
from slimsam_jax.errors import InputError
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.predictor import Prompt, SamPredictor

BOTH = ("image_uint8", "image2_uint8")
CASES = ("point1", "points2", "box", "queries4", "batch2")


@pytest.fixture(scope="module")
def whole():
    with np.load(shared("golden/efficient_sam.npz")) as arrays:
        return dict(arrays)


def arrays(whole, place: tuple[str, int, int]) -> list[np.ndarray]:
    """Points and labels of a case, an image and a query."""
    return [whole[f"{place[0]}/{kind}"][place[1:]] for kind in ("points", "labels")]


def taken(whole, place: tuple[str, int, int]) -> bool:
    """Whether it has no background points."""
    return (arrays(whole, place)[1] != 0).all()


def prompt(points: np.ndarray, labels: np.ndarray) -> Prompt:
    """Of the original's points, among which are box corners."""
    box, given = points[np.isin(labels, (2, 3))], labels == 1
    clicks = (points[given], labels[given]) if given.any() else (None, None)
    return Prompt(*clicks, box.ravel() if len(box) else None)


def test_every_case_of_the_original(whole):
    """Two images of many prompts each, in one call; background points, which it only seems to take, are refused."""
    state = {name[3:]: whole[name] for name in whole if name.startswith("sd/")}
    predictor = SamPredictor(from_state_dict(state, image_size=256, heads=3))
    places = [(case, i, q) for case in CASES for i, q in np.ndindex(whole[f"{case}/points"].shape[:2])]
    of_image = [[place for place in places if place[1] == i and taken(whole, place)] for i in (0, 1)]
    assert [len(of) for of in of_image] == [8, 2]
    prompts = [[prompt(*arrays(whole, place)) for place in of] for of in of_image]
    found = predictor.predict_batch([whole[name] for name in BOTH], prompts, return_logits=True)
    for (case, *at), ours in zip(of_image[0] + of_image[1], found[0] + found[1], strict=True):
        np.testing.assert_allclose(ours.low_res_masks, whole[f"{case}/multi/low_res_masks"][*at], atol=1e-4)
        np.testing.assert_allclose(ours.iou_predictions, whole[f"{case}/multi/iou_predictions"][*at], atol=1e-5)
        if f"{case}/multi/mask_logits" in whole:
            np.testing.assert_allclose(ours.masks, whole[f"{case}/multi/mask_logits"][*at], atol=1e-4)
    predictor.set_image(whole["image_uint8"])
    np.testing.assert_allclose(predictor.get_image_embedding(), whole["image_embedding"], atol=5e-5)
    single = predictor.predict(*prompts[0][2], multimask_output=False, return_logits=True)
    np.testing.assert_allclose(single.masks, whole["box/single/mask_logits"][0, 0], atol=1e-4)
    assert (whole["points6/labels"] == 0).any()
    with pytest.raises(InputError, match="no background points"):
        predictor.predict(whole["points6/points"][0, 0, :2], whole["points6/labels"][0, 0, :2])


@pytest.fixture(scope="module")
def sam():
    return efficient_sam()


@pytest.fixture(scope="module")
def predictor(sam):
    predictor = SamPredictor(sam)
    predictor.set_image(random_image(0, 20, 31))
    return predictor


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"point_coords": [[1, 2], [3, 4]], "point_labels": [1, 0]}, "no background points"),
        ({"point_coords": [[1, 2]] * 7}, "6 points at most, of which a box is two, not 7"),
        ({"point_coords": [[1, 2]] * 5, "box": [1, 2, 3, 4]}, "not 7"),
        ({"box": [1, 2, 3, 4], "mask_input": np.zeros((1, 12, 8), np.float32)}, "no mask as a prompt"),
        ({"point_coords": [[1, 2]], "point_labels": [-1]}, "needs a point or a box"),
    ],
)
def test_what_it_cannot_take_is_refused_in_a_line(predictor, fields, reason):
    for call in (
        lambda: predictor.predict(**fields),
        lambda: predictor.predict_batch([np.zeros((9, 9, 3), np.uint8)], [[Prompt(**fields)]]),
    ):
        with pytest.raises(InputError, match=reason) as refusal:
            call()
        assert "\n" not in str(refusal.value)


def test_what_is_ignored_changes_nothing(predictor):
    """Nor does a corner beyond the image, which the original puts at -1, wherever it is."""
    alone = predictor.predict([[5, 6]], box=[-3, 2, 9, 12])
    other = predictor.predict([[7, 8], [5, 6]], [-1, 1], box=[-9, 2, 9, 12])
    np.testing.assert_array_equal(other.low_res_masks, alone.low_res_masks)
    assert alone.masks.shape == (3, 20, 31) and alone.low_res_masks.shape == (3, 12, 8)


def test_everything_gives_the_masks_of_its_points(sam, predictor):
    nothing = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    found = SamAutomaticMaskGenerator(sam, points_per_side=2, **nothing).generate(random_image(0, 20, 31))
    assert found
    expected = {tuple(p): predictor.predict([p]) for p in {tuple(record["point_coords"][0]) for record in found}}
    for record in found:
        masks = expected[tuple(record["point_coords"][0])].masks
        different = (masks != record["segmentation"]).mean(axis=(1, 2))
        assert different.min() < 0.005  # a pixel whose logit is nearly 0


def test_it_is_evaluated_beside_a_sam(sam, material):
    models, data = [random_sam(SQUARE), sam], material / "val"
    summary = api.evaluate(models, data, ["point", "box", "agreement"], resamples=10).summary
    assert all(0 <= summary[f"{protocol}/iou"][1]["mean"] <= 1 for protocol in ("point", "box", "agreement"))
    with pytest.raises(InputError, match="model 2 cannot be measured by --protocol clicks"):
        api.evaluate(models, data, ["point", "clicks"])
