"""FastSAM's masks and prompts as ultralytics 8.4 makes them, against arrays that it computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from helpers.fast_sam_models import TINY
from helpers.golden_fast_sam import cases, subset
from slimsam_jax.errors import InputError
from slimsam_jax.everything import Options as Command
from slimsam_jax.everything import generator_of
from slimsam_jax.imaging.letterbox import Letterbox, fit
from slimsam_jax.inference import fast_sam, fast_sam_predictor
from slimsam_jax.inference.fast_sam import Options, assemble
from slimsam_jax.inference.fast_sam_boxes import Detections
from slimsam_jax.inference.fast_sam_masks import Masks
from slimsam_jax.inference.fast_sam_predictor import FastSamPredictor
from slimsam_jax.inference.fast_sam_ultralytics import finer, select
from slimsam_jax.models.fast_sam import FastSam

ULTRALYTICS = Options(postprocessing="ultralytics")


@pytest.fixture(scope="module")
def golden():
    return subset()


def assembled(golden, **more):
    """Its detections of the golden image, which are the original's to the bit, and what becomes of them."""
    size, rows = golden["image_bgr_uint8"].shape[:2], golden["nms"]
    detections = Detections(rows[:, :4], rows[:, 4], rows[:, 6:].copy(), golden["nms_anchor"])
    how, prototypes = dataclasses.replace(ULTRALYTICS, **more), golden["raw/prototypes"][0].transpose(1, 2, 0)
    return lambda: assemble(detections, prototypes, rows[:, :2], fit(size, 192), size, how), detections


@pytest.mark.parametrize("retina", [True, False])
def test_boxes_and_masks_are_ultralytics(golden, retina):
    make, detections = assembled(golden, retina_masks=retina)
    found, wanted = make(), golden[f"u84/retina_{retina}/masks"]
    np.testing.assert_allclose(found.boxes, golden[f"u84/retina_{retina}/boxes"][:, :4], atol=1e-3)
    np.testing.assert_allclose(found.scores, golden[f"u84/retina_{retina}/boxes"][:, 4], atol=1e-4)
    assert found.masks.shape == wanted.shape[1:] and len(found.masks) == len(wanted) == 120
    # 3 pixels of 2.5 and 3.7 million have logits within rounding of 0; the original's masks differ in 1 to 5 %.
    assert sum((mask != true).sum() for mask, true in zip(found.masks, wanted, strict=True)) <= 3
    detections.coefficients[3] = 0
    assert len(make().masks) == len(make().boxes) == 119  # an empty one is dropped


def test_prompts_select_what_ultralytics_selects(golden):
    masks, names = Masks.of_arrays(golden["u84/retina_True/masks"]), cases(golden, "u84/prompt/")
    assert len(names) == 6
    for name in names:
        of = {key: golden.get(f"u84/prompt/{name}/{key}") for key in ("points", "labels", "bboxes", "indices")}
        boxes = [] if of["bboxes"] is None else np.atleast_2d(of["bboxes"])
        assert select(masks, of["points"], of["labels"], boxes) == of["indices"].tolist(), name


def test_a_union_of_prompts_by_hand():
    """Any point of label 1 suffices, none of label 0 may lie on it, a box adds its own; points beside are clipped."""
    left, right, whole = (np.zeros((4, 6), bool) for _ in range(3))
    left[:, :2], right[:, 4:], whole[:] = True, True, True
    masks = Masks.of_arrays(np.stack([left, right, whole]))
    assert select(masks, [[0, 0], [5, 0]], [1, 1]) == [0, 1, 2]
    assert select(masks, [[0, 0], [3, 0]], [1, 0]) == [0]
    assert select(masks, [[0, 0]], [0]) == [1]
    assert select(masks, [[0, 0]], [0], [[0, 0, 6, 4]]) == [1, 2]
    assert select(masks, [[9, -3]], [1]) == [1, 2] and select(masks, [[3, 0]], [0]) == [0, 1]
    assert select(masks, None, (), []) == select(masks.take([]), [[0, 0]], [1], [[0, 0, 2, 2]]) == []


@pytest.mark.parametrize(
    ("size", "top", "left", "times"), [((128, 96), 0, 16, 1), ((90, 128), 6, 0, 2), ((99, 128), 14, 0, 4)]
)
def test_prototypes_are_enlarged_until_the_bars_are_whole_pixels(size, top, left, times):
    assert finer(Letterbox(size, top, left, (128, 128))) == times


@pytest.fixture
def model(golden, monkeypatch):
    """A FastSAM whose network gives the golden detections, so that nothing is compiled."""
    boxes, rest = golden["nms"][:, :4], golden["nms"][:, [4, *range(6, 38)]]
    rows = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], rest], axis=1)
    given = rows[None], golden["raw/prototypes"].transpose(0, 2, 3, 1)
    monkeypatch.setattr(fast_sam, "detect", lambda config, params, frame: given)
    return FastSam(dataclasses.replace(TINY, image_size=192), {})


def test_predictor_and_everything_take_it(golden, model, monkeypatch):
    predictor, image = FastSamPredictor(model, ULTRALYTICS), golden["image_bgr_uint8"]
    predictor.set_image(image, "BGR")
    np.testing.assert_allclose(predictor.found.boxes, golden["u84/retina_True/boxes"][:, :4], atol=1e-3)
    held = golden["u84/prompt/point_pos/indices"]
    masks, scores, choices = predictor.predict(golden["u84/prompt/point_pos/points"])
    assert [choice.indices for choice in choices] == [(i,) for i in held] and masks.shape == (len(held), 120, 171)
    assert (masks != golden["u84/retina_True/masks"][held]).sum() <= 3
    np.testing.assert_array_equal(scores, predictor.found.scores[held])
    one, score, _ = predictor.predict(golden["u84/prompt/point_pos/points"], multimask_output=False)
    np.testing.assert_array_equal(one, masks[:1])
    assert score == scores[0]
    empty, score, (choice,) = predictor.predict([[85, 60], [85, 60]], [1, 0])
    assert empty.shape == (1, 120, 171) and not empty.any() and score == [0] and choice == ((), ())
    command = Command("model", ("images",), "out.json", postprocessing="ultralytics")
    records = generator_of(model, command).generate(image)
    assert [record["area"] for record in records] == predictor.found.masks.areas.tolist()
    monkeypatch.setattr(fast_sam_predictor, "MOST_BYTES", masks.size - 1)
    with pytest.raises(InputError, match="15 masks at this prompt take 0 MB"):
        predictor.predict([[85, 60]])


def test_what_does_not_go_with_it_is_one_line(golden, model):
    frames = FastSamPredictor(model, dataclasses.replace(ULTRALYTICS, retina_masks=False))
    frames.set_image(golden["image_bgr_uint8"])
    for call, message in (
        (lambda: frames.predict([[3, 3]]), "select masks of the image's size: leave retina_masks on"),
        (lambda: Options(postprocessing="yolo"), "postprocessing 'yolo' is none of fast_sam, ultralytics"),
        (lambda: Options(postprocessing=["ultralytics"]), "is none of fast_sam, ultralytics"),
        (lambda: dataclasses.replace(ULTRALYTICS, empty_list=False), "empty_list=False is a fault of the original's"),
        (
            lambda: generator_of(object(), Command("sam", (), "out.json", postprocessing="ultralytics")),
            "--postprocessing is of a FastSAM, and sam is a SAM",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
