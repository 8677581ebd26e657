"""FastSAM's detections, masks and prompts against arrays of the original; its faults, mended and as they were."""

from __future__ import annotations

import dataclasses
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import slimsam_jax
from helpers.fast_sam_models import random_fast_sam
from helpers.golden_fast_sam import cases, subset
from helpers.images import random_image
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.imaging.letterbox import fit
from slimsam_jax.imaging.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Prompts
from slimsam_jax.inference import fast_sam as inference
from slimsam_jax.inference import fast_sam_boxes, fast_sam_masks
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.fast_sam import ORIGINAL, Options, choose, decode_prompts, find, find_one
from slimsam_jax.inference.fast_sam_masks import Masks
from slimsam_jax.inference.fast_sam_predictor import FastSamMaskGenerator, FastSamPredictor, predictor_for
from slimsam_jax.inference.fast_sam_prompts import Choice, box_in_masks, by_box, by_boxes, by_points, by_text, draw
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.models.fast_sam import Outputs, decode
from slimsam_jax.models.sam import Sam

SIZE = (48, 64)  # (height, width) of the images that the tiny model sees, in its frame as they are


@pytest.fixture(scope="module")
def golden():
    return subset()


@pytest.fixture(scope="module")
def decoded(golden):
    """[n, 37] of the golden image."""
    last = lambda name: np.moveaxis(golden[name], 1, -1)
    levels, rows = [last(f"raw/{level}") for level in range(3)], last("raw/mask_coefficients")
    parts = np.split(rows, np.cumsum([level[0, ..., 0].size for level in levels])[:-1], axis=1)
    coefficients = tuple(part.reshape(*level.shape[:3], 32) for part, level in zip(parts, levels, strict=True))
    outputs = Outputs(tuple(a[..., :64] for a in levels), tuple(a[..., 64:] for a in levels), coefficients, None)
    return np.asarray(decode(outputs))[0]


@pytest.fixture(scope="module")
def model():
    return random_fast_sam()


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(random_image(1, *SIZE))


@pytest.fixture
def predictor(model, image):
    predictor = FastSamPredictor(model)
    predictor.set_image(image)
    return predictor


def test_suppression_keeps_the_original_s_cells(golden, decoded):
    found = fast_sam_boxes.suppress(decoded, 0.4, 0.9, 300)
    np.testing.assert_array_equal(found.cells, golden["nms_anchor"])
    rows = np.concatenate([found.boxes, found.scores[:, None]], axis=1)
    np.testing.assert_allclose(rows, golden["nms"][:, :5], atol=2e-3)
    np.testing.assert_allclose(found.coefficients, golden["nms"][:, 6:], atol=1e-3)
    fewer = fast_sam_boxes.suppress(decoded, 0.4, 0.5, 10)
    np.testing.assert_allclose(fewer.boxes, golden["nms_iou05_maxdet10"][:, :4], atol=2e-3)


@pytest.mark.parametrize(("iou", "most"), [(0.9, 300), (0.9, 40), (0.7, 300)])
def test_clustered_boxes(golden, iou, most):
    wanted = golden[f"nms_case/iou{round(100 * iou)}_max{most}"]
    found = fast_sam_boxes.suppress(golden["nms_case/prediction"][0].T, 0.4, iou, most)
    np.testing.assert_array_equal(found.boxes, wanted[:, :4])
    np.testing.assert_array_equal(found.scores, wanted[:, 4])
    np.testing.assert_array_equal(found.coefficients, wanted[:, 6:])


def test_what_is_not_finite_is_no_detection(decoded):
    broken = decoded.copy()
    broken[::2, 0] = np.inf
    broken[1::4, 9] = np.nan
    kept = fast_sam_boxes.suppress(broken, 0.4, 0.9, 300)
    assert len(kept.cells) and set(kept.cells % 4) == {3}


@pytest.mark.parametrize("case", ["no_full", "one_full"])
def test_the_border_rule(golden, case):
    boxes = golden[f"full_box/{case}/in"][:, :4]
    found = fast_sam_boxes.to_border(boxes, tuple(golden[f"full_box/{case}/input_shape"]), several=False)
    np.testing.assert_array_equal(found, golden[f"full_box/{case}/out"][:, :4])


def test_two_boxes_that_fill_the_image_are_both_kept(golden):
    boxes, frame = golden["full_box/two_full/in"][:, :4], tuple(map(int, golden["full_box/two_full/input_shape"]))
    assert golden["full_box/two_full/error"]
    with pytest.raises(RunError, match="2 boxes fill the image, and the original fails with more than one"):
        fast_sam_boxes.to_border(boxes, frame, several=False)
    found = fast_sam_boxes.to_border(boxes, frame)
    np.testing.assert_array_equal(found[:2], [[0, 0, frame[1], frame[0]]] * 2)
    np.testing.assert_array_equal(found[2], boxes[2])


@pytest.mark.parametrize("retina", [True, False])
def test_masks_are_the_original_s(golden, decoded, retina):
    size = golden["image_bgr_uint8"].shape[:2]
    place = fit(size, 192)
    detections = fast_sam_boxes.suppress(decoded, 0.4, 0.9, 300)
    detections = detections._replace(boxes=fast_sam_boxes.to_border(detections.boxes, place.frame))
    options = dataclasses.replace(ORIGINAL, retina_masks=retina)
    prototypes = golden["raw/prototypes"][0].transpose(1, 2, 0)
    found = inference.assemble(detections, prototypes, decoded[detections.cells, :2], place, size, options)
    wanted = golden[f"result/retina_{retina}/masks"]
    np.testing.assert_allclose(found.boxes, golden[f"result/retina_{retina}/boxes"][:, :4], atol=2e-3)
    assert found.masks.shape == wanted.shape[1:] and len(found.masks) == len(wanted) == 120
    assert all((mask == true).mean() >= 0.999 for mask, true in zip(found.masks, wanted, strict=True))
    assert np.abs(found.masks.areas - golden[f"result/retina_{retina}/mask_area"]).max() <= 3
    detections.coefficients[3] = 0  # a mask without a pixel
    for how, count in ((options, 120), (Options(retina_masks=retina), 119)):
        found = inference.assemble(detections, prototypes, decoded[detections.cells, :2], place, size, how)
        assert len(found.masks) == len(found.boxes) == len(found.scores) == len(found.points) == count
        assert (found.masks.areas == 0).sum() == count - 119


@pytest.mark.parametrize("case", ["same_size", "other_size", "real_retina"])
def test_prompts_choose_what_the_original_chooses(golden, case):
    masks, size = Masks.of_arrays(golden[f"prompt/{case}/masks"]), tuple(map(int, golden[f"prompt/{case}/image_size"]))
    points, boxes = (cases(golden, f"prompt/{case}/{kind}/") for kind in ("point", "box"))
    assert len(points) == 7 and len(boxes) == 5
    for name in points:
        told = {key: golden[f"prompt/{case}/point/{name}/{key}"] for key in ("points", "labels", "mask")}
        found = draw(masks, by_points(masks, told["points"], told["labels"], size))
        np.testing.assert_array_equal(found, told["mask"], err_msg=name)
    for name in boxes:
        told = {key: golden[f"prompt/{case}/box/{name}/{key}"] for key in ("boxes", "indices")}
        assert by_boxes(masks, told["boxes"], size) == told["indices"].tolist(), name


def test_boxes_are_rounded_to_even_or_cut_off_where_sizes_differ():
    assert box_in_masks([10.5, 11.5, 40.5, 41.5], (50, 60), (50, 60)) == (10, 12, 40, 42)
    assert box_in_masks([-3.2, 1, 70, 90], (50, 60), (50, 60)) == (0, 1, 60, 50)
    assert box_in_masks([10.5, 11.5, 40.5, 41.5], (25, 30), (50, 60)) == (5, 5, 20, 20)


def test_boxes_that_end_at_zero_are_refused(predictor):
    with pytest.raises(InputError, match="a box that ends at 0 holds no pixel"):
        by_box(Masks.of_arrays(np.ones((1, 4, 4), bool)), [-3, 0, 0, 2], (4, 4))
    with pytest.raises(InputError, match="a box that ends at 0 holds no pixel"):
        predictor.predict(box=[-3, 0, 0, 2])


def test_annotated_boxes_that_end_at_zero_choose_nothing(model):
    """SA-1B's box of a mask one pixel wide at the edge: other prompts of its image are measured all the same."""
    masks = Masks.of_arrays(np.ones((1, 20, 20), bool))
    found = SimpleNamespace(masks=masks, scores=np.array([0.9]), original_size=(20, 20))
    boxes = np.array([[[0, 3], [0, 9]], [[3, 0], [9, 0]], [[3, 3], [9, 9]]], float)
    labels = np.tile([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], (3, 1))
    choices, scores = decode_prompts(model, found, Prompts(boxes, labels))
    assert [choice.indices for choice in choices[:, 0]] == [(), (), (0,)]
    np.testing.assert_array_equal(scores[:, :2], np.float32([[0, 0], [0, 0], [0.9, 0.9]]))


def test_masks_are_kept_as_bits_of_their_windows():
    random = np.random.default_rng(0)
    window, whole = np.s_[3:9, 5:22], np.zeros((12, 30), bool)
    whole[window] = random.random((6, 17)) > 0.5
    masks = Masks((12, 30), [fast_sam_masks.pack(whole[window], window)])
    np.testing.assert_array_equal(masks[0], whole)
    assert masks.areas[0] == whole.sum() == Masks.of_arrays(whole[None]).areas[0]
    held = np.array([[masks.holds(x, y)[0] for x in range(-1, 31)] for y in range(-1, 13)])
    np.testing.assert_array_equal(held[1:-1, 1:-1], whole)
    assert not held[0].any() and not held[:, -1].any()
    for box in ((0, 0, 30, 12), (7, 4, 20, 6), (0, 0, 5, 3), (6, 1, 7, 30)):
        assert masks.shared(box) == whole[box[1] : box[3], box[0] : box[2]].sum()


def test_masks_that_would_not_fit_are_refused_before_memory_is_asked_for(golden, decoded):
    boxes = np.tile(np.float32([[0, 0, 40_000, 20_000]]), (200, 1))
    prototypes = golden["raw/prototypes"][0].transpose(1, 2, 0)
    tracemalloc.start()
    with pytest.raises(InputError, match="200 masks of an image this large take 19073 MB"):
        fast_sam_masks.in_image(np.zeros((200, 32), np.float32), prototypes, boxes, (20_000, 40_000))
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_predictor_is_called_as_sam_s(predictor, model, image):
    masks, scores, choices = predictor.predict(np.array([[30, 20]]), np.array([1]))
    assert masks.shape == (3, *SIZE) and masks.dtype == bool and (np.diff(scores) <= 0).all()
    assert masks[:, 20, 30].all() and all(len(choice.indices) == 1 for choice in choices)
    (joined,), score, (choice,) = predictor.predict([[30, 20]], multimask_output=False)
    assert score == predictor.found.scores[list(choice.indices)].max() and (joined >= masks.any(0)).all()
    again = slimsam_jax.predict(model, image, points=[[30, 20]])
    np.testing.assert_array_equal(again.masks[0], joined)
    bgr = FastSamPredictor(model)
    bgr.set_image(np.asarray(image)[..., ::-1], "BGR")
    np.testing.assert_array_equal(bgr.found.scores, predictor.found.scores)
    assert isinstance(predictor_for(model), FastSamPredictor)


def test_a_box_and_points_choose_together(predictor):
    box = np.array([10, 5, 50, 40])
    (mask,), _, (choice,) = predictor.predict(box=box, multimask_output=False)
    overlap = lambda mask: mask[5:40, 10:50].sum() / (35 * 40 + mask.sum() - mask[5:40, 10:50].sum())
    assert overlap(mask) == max(map(overlap, predictor.found.masks))
    several, _, _ = predictor.predict(box=box)
    np.testing.assert_array_equal(several[0], mask)
    inside = np.argwhere(mask)[0][::-1]
    beside, _, other = predictor.predict(inside[None], [0], box=box, multimask_output=False)
    assert other[0] != choice and not beside[0][tuple(inside[::-1])]


def test_a_point_on_no_mask_gives_an_empty_one_with_score_zero(predictor):
    covered = np.any(list(predictor.found.masks), axis=0)
    point = np.argwhere(~covered)[0][::-1] if not covered.all() else np.array([-1, -1])
    for several in (True, False):
        masks, scores, (choice,) = predictor.predict(point[None], multimask_output=several)
        assert masks.shape == (1, *SIZE) and not masks.any() and scores == [0] and choice == ((), ())


def test_a_box_on_no_mask_gives_an_empty_one_with_score_zero():
    """The original takes the first mask then, wherever it lies."""
    masks, box = np.zeros((2, 20, 20), bool), [12, 12, 18, 18]
    masks[:, :5, :5] = True
    found = SimpleNamespace(masks=Masks.of_arrays(masks), scores=np.array([0.9, 0.8]), original_size=(20, 20))
    choices, scores = choose(found, None, (), box)
    assert choices == [Choice()] * 4 and not scores.any() and by_box(found.masks, box, (20, 20)) == 0
    masks[1, 15, 15] = True
    found.masks = Masks.of_arrays(masks)
    choices, scores = choose(found, None, (), box)
    assert choices[:3] == [Choice((1,), (True,))] * 2 + [Choice()] and scores[0] == np.float32(0.8)


def test_everything_has_sam_s_records(predictor, model, image):
    found = FastSamMaskGenerator(model, output_mode="coco_rle").generate(image)
    masks = predictor.everything()
    assert len(found) == len(masks) == len(predictor.found.scores) > 3
    assert [record["predicted_iou"] for record in found] == sorted((r["predicted_iou"] for r in found), reverse=True)
    for record, same in zip(masks, found, strict=True):
        mask, (x, y, width, height) = record["segmentation"], record["bbox"]
        assert record["area"] == mask.sum() > 0 and mask[y : y + height + 1, x : x + width + 1].sum() == mask.sum()
        assert same["bbox"] == record["bbox"] and same["segmentation"]["size"] == list(SIZE)
        assert 0 <= record["point_coords"][0][0] <= SIZE[1] and record["crop_box"] == [0, 0, SIZE[1], SIZE[0]]


def test_everything_leaves_the_image_that_is_set_alone(model, image):
    """Two threads ask one generator: what one sets the other may not read."""
    generator = FastSamMaskGenerator(model)
    generator.predictor.set_image(image)
    before = generator.predictor.found
    assert generator.generate(np.asarray(image)[:20]) and generator.predictor.found is before


def test_nothing_detected_is_an_empty_list_and_was_none(image):
    model = random_fast_sam(bias=-20)
    assert FastSamMaskGenerator(model).generate(image) == []
    predictor = FastSamPredictor(model)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(box=[3, 3, 30, 30])
    assert not masks.any() and scores == [0]
    assert find(model, [image, image], ORIGINAL) is None
    with pytest.raises(RunError, match="the original gives None for this image"):
        find_one(model, image, ORIGINAL)


def test_an_image_s_place_in_a_batch_does_not_matter_and_did(model, image, monkeypatch):
    first, second = find(model, [image, image])
    np.testing.assert_array_equal(first.boxes, second.boxes)
    before = find(model, [image, image], dataclasses.replace(ORIGINAL, several_full_boxes=True))
    np.testing.assert_array_equal(before[0].scores, before[1].scores)
    assert (before[0].boxes != before[1].boxes).any()
    monkeypatch.setattr(fast_sam_boxes, "FULL", 0.0)  # every box fills the image
    assert find(model, [image], ORIGINAL) is None and len(find(model, [image])[0].scores)


def test_images_of_different_sizes_have_square_frames(model, image, monkeypatch):
    frames = []
    real = inference.letterbox
    monkeypatch.setattr(inference, "letterbox", lambda *a: frames.append(real(*a)) or frames[-1])
    wide = image.resize((64, 30))
    find(model, [wide])
    find(model, [wide, image])
    find(model, [wide], Options(rectangle=False))
    assert [frame.shape[:2] for frame in frames] == [(32, 64), (64, 64), (64, 64), (64, 64)]


def test_what_a_fast_sam_cannot_do_is_one_line(predictor, model):
    points = [[3, 3]]
    for call, message in (
        (lambda: predictor.predict(), "a prompt needs points, a box or a mask"),
        (lambda: predictor.predict(points, mask_input=np.zeros((1, 16, 16))), "takes no mask as a prompt"),
        (lambda: predictor.predict(points, return_logits=True), "which have no logits"),
        (lambda: predictor.predict(points, multimask_output=2), "neither True nor False"),
        (lambda: predictor.predict([[900, 3]]), "lies far outside the image"),
        (lambda: predictor.predict(box=[5, 5, 5, 9]), "is none: x0, y0 is its upper left corner"),
        (lambda: predictor.text("a dog"), "text prompts need a CLIP, which is no part of this package: give a folder"),
        (lambda: FastSamPredictor(model, clip="a folder"), "clip is what slimsam_jax.load_clip gives, not a str"),
        (lambda: predictor.everything("png"), "output_mode 'png' is none of"),
        (lambda: predictor.set_image(np.zeros((4, 4))), "an image is uint8"),
        (lambda: FastSamPredictor(model).predict(points), "no image is set"),
        (lambda: FastSamPredictor("fast.pt"), "takes a FastSAM, as slimsam_jax.load gives it, not a str"),
        (lambda: SamPredictor(model), "this is a FastSAM, which has neither SAM's prompt encoder"),
        (lambda: SamAutomaticMaskGenerator(model), "this is a FastSAM"),
        (lambda: predictor_for(5), "a model must be given"),
        (lambda: Options(conf=2), "conf 2 must be a number from 0 to 1"),
        (lambda: Options(iou=float("nan")), "iou nan"),
        (lambda: Options(max_det=0), "max_det 0 must be at least 1"),
        (lambda: Options(retina_masks="yes"), "retina_masks 'yes' is neither True nor False"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert not isinstance(model, Sam)


class HandMade:
    """Stands for a CLIP: a text is a color, and the similarity of an image how much of it has that color."""

    def similarity(self, images, text):
        self.images = list(images)
        color = {"red": (255, 0, 0), "green": (0, 255, 0)}[text]
        return np.array([(image == color).all(-1).mean() for image in self.images])


def test_a_text_chooses_the_mask_whose_crop_is_most_like_it(predictor, model):
    """Masks of 100 pixels or less take no part; what lies beside a mask is white, and does not count."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:30, :30], pixels[5:25, 5:25], pixels[40:45, :20] = (255, 0, 0), (0, 255, 0), (255, 0, 0)
    frame, inner, strip = np.zeros((3, *SIZE), bool)
    frame[:30, :30], inner[5:25, 5:25], strip[40:45, :20] = True, True, True
    frame &= ~inner
    masks = Masks.of_arrays(np.stack([strip, inner, frame]))
    assert masks.areas[0] == 100
    clip = HandMade()
    indices, similarity = by_text(masks, pixels, "red", clip)
    assert indices.tolist() == [2, 1] and similarity.tolist() == [np.float32(500 / 900), 0]
    (first, second) = clip.images
    assert first.shape == (20, 20, 3) and (first == (0, 255, 0)).all()
    assert second.shape == (30, 30, 3) and (second[10, 10] == 255).all() and (second[0, 0] == (255, 0, 0)).all()

    predictor = FastSamPredictor(model, clip=clip)
    with pytest.raises(InputError, match="no image is set"):
        predictor.text("red")
    predictor.set_image(pixels)
    predictor.found = predictor.found._replace(masks=masks)
    best = predictor.text("green")
    np.testing.assert_array_equal(best.masks, inner[None])
    assert best.scores.tolist() == [1] and best.choices[0].indices == (1,)
    assert [choice.indices for choice in predictor.text("red", multimask_output=True).choices] == [(2,), (1,)]
    predictor.found = predictor.found._replace(masks=masks.take(np.array([0])))
    nothing = predictor.text("red")
    assert not nothing.masks.any() and nothing.scores.tolist() == [0] and nothing.choices[0].indices == ()
    predictor.found = predictor.found._replace(original_size=(4, 4))
    for call, message in (
        (lambda: predictor.text(" "), "a text prompt is some words, not ' '"),
        (lambda: predictor.text("red"), "leave retina_masks on"),
    ):
        with pytest.raises(InputError, match=message):
            call()
