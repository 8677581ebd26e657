"""All masks of an image, against the original generator; its parts by hand."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from converters.from_torch import from_state_dict, load
from helpers import peers
from helpers.images import random_image, save_image, truncated
from helpers.masks import brute_nms, matched
from helpers.models import SQUARE, random_sam
from helpers.shared import shared
from slimsam_jax import data, everything
from slimsam_jax.checkpoint import save
from slimsam_jax.errors import InputError
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.imaging.prompts import clicks_at
from slimsam_jax.imaging.transforms import resize_masks
from slimsam_jax.inference import amg, hierarchical
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.candidates import Candidates, enlarge, unpack
from slimsam_jax.inference.decode import Encoded, decode_prompts, encode_image

GRID = [np.zeros((1, 2))]


@pytest.fixture(scope="module")
def stock():
    return peers.stock_sam(SQUARE)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2},
        {"box_nms_thresh": 0.95, "stability_score_offset": 2e-3, "points_per_batch": 7},
    ],
    ids=str,
)
def test_records_equal_the_originals(stock, fields):
    sam = from_state_dict(peers.state_dict(stock))
    image = random_image(3, 40, 60)
    clicks = clicks_at(np.array([[9.0, 9.0], [30.0, 20.0]]))
    scores = decode_prompts(sam, encode_image(sam, Image.fromarray(image)), clicks)[1][:, 1:]
    thresholds = {"pred_iou_thresh": float(np.quantile(scores, 0.3)), "stability_score_thresh": 0.3}
    small = {"stability_score_offset": 1e-3, "box_nms_thresh": 0.98}  # of random weights logits are small, masks alike
    fields = {"points_per_side": 6, **small, **thresholds, **fields}
    found = SamAutomaticMaskGenerator(sam, **fields).generate(image)
    wanted = peers.mask_generator(stock, brute_nms, **fields).generate(image)
    assert len(found) == len(wanted) >= 2
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert one["crop_box"] == other["crop_box"]
        np.testing.assert_allclose(one["point_coords"], other["point_coords"])
        assert iou(one["segmentation"], other["segmentation"]) > 0.98
        for name in ("predicted_iou", "stability_score"):
            assert one[name] == pytest.approx(other[name], abs=0.01)
        assert np.abs(np.subtract(one["bbox"], other["bbox"])).max() <= 1
        assert one["area"] == one["segmentation"].sum()


def test_masks_of_a_crop_are_in_the_images_frame_and_not_at_its_edge():
    """Blobs in the middle, at the right and at the left of two crops, of which one has the image's own left edge."""
    generator = SamAutomaticMaskGenerator(random_sam(SQUARE), pred_iou_thresh=0.5, stability_score_thresh=0.5)
    low = np.full((3, 16, 16), -9.0, np.float32)
    low[0, 6:10, 6:10] = low[1, 6:10, 12:] = low[2, 6:10, :4] = 9
    decoded = hierarchical.Decoded(np.array([[50.0, 50.0], [90.0, 50.0], [9.0, 50.0]]), np.ones(3, np.float32), low)
    encoded = Encoded(None, SQUARE.image_size, (100, 100))
    for left, wanted in ((100, [0]), (0, [0, 2])):
        crop = np.array([left, 120, left + 100, 220])
        found, index = generator._passing(encoded, crop, (300, 250), decoded)
        assert index.tolist() == wanted and (found.crop_boxes == crop).all()
        np.testing.assert_array_equal(found.points, decoded.points[wanted] + [left, 120])
        mask = unpack(found, 0, (300, 250))
        assert amg.mask_to_box(mask).tolist() == found.boxes[0].tolist() and mask.sum() == found.areas[0] > 500
        np.testing.assert_allclose(found.boxes[0].reshape(2, 2).mean(0), [left + 49.5, 169.5])


def test_of_duplicates_that_of_the_smaller_crop_stays(monkeypatch):
    generator = SamAutomaticMaskGenerator(random_sam(SQUARE), crop_n_layers=1)

    def of_crop(self, image, crop_box, layer):
        """The same square, wherever all of it is seen."""
        (x0, y0, x1, y1), mask = crop_box, np.zeros((90, 90), bool)
        mask[5:30, 5:30] = True
        bits, one = np.packbits(mask[y0:y1, x0:x1], axis=-1), np.ones(int(x0 < 5 and y0 < 5))
        part = lambda values: np.repeat(np.array([values]), len(one), axis=0)
        return Candidates([bits][: len(one)], part([5, 5, 29, 29]), 625 * one, one, one, part([9, 9]), part(crop_box))

    monkeypatch.setattr(SamAutomaticMaskGenerator, "_of_crop", of_crop)
    (record,) = generator.generate(np.zeros((90, 90, 3), np.uint8))
    assert record["crop_box"][:2] == [0, 0] and record["crop_box"][2] < 90 and record["segmentation"].sum() == 625


def test_enlarged_masks_equal_resized_logits():
    sam = random_sam(SQUARE)
    encoded = encode_image(sam, Image.fromarray(random_image(0, 70, 33)))
    low = np.random.default_rng(0).standard_normal((5, 16, 16)).astype(np.float32)
    low[4] = -3
    bits, boxes, areas, stability = enlarge(sam, encoded, low, offset=0.5)
    logits = resize_masks(sam.config.image_size, low, encoded.size, encoded.original_size)
    masks = np.unpackbits(bits, axis=-1, count=33).astype(bool)
    np.testing.assert_array_equal(masks, logits > 0)
    np.testing.assert_array_equal(areas, (logits > 0).sum((1, 2)))
    np.testing.assert_array_equal(boxes, [amg.mask_to_box(mask) for mask in masks])
    high, low = ((logits[:4] > cut).sum((1, 2)) for cut in (0.5, -0.5))
    np.testing.assert_allclose(stability[:4], high / low)
    assert stability[4] == 0 and not boxes[4].any()
    assert enlarge(sam, encoded, np.zeros((0, 16, 16)))[0].shape == (0, 70, 5)


def test_the_three_output_modes_say_the_same():
    sam, image = random_sam(SQUARE), random_image(3, 40, 60)
    fields = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    modes = ("binary_mask", "uncompressed_rle", "coco_rle")
    found = [SamAutomaticMaskGenerator(sam, output_mode=mode, **fields).generate(image) for mode in modes]
    assert len(found[0]) > 1
    for binary, plain, packed in zip(*found, strict=True):
        np.testing.assert_array_equal(rle.decode(plain["segmentation"]), binary["segmentation"])
        np.testing.assert_array_equal(rle.decode(packed["segmentation"]), binary["segmentation"])
        json.dumps(packed)


def test_an_image_with_nothing_in_it_gives_nothing():
    for fields in ({}, {"hierarchical": True}, {"crop_n_layers": 1}, {"min_mask_region_area": 9}):
        generator = SamAutomaticMaskGenerator(random_sam(SQUARE), 4, pred_iou_thresh=99.0, **fields)
        assert generator.generate(np.zeros((30, 40, 3), np.uint8)) == []
    tiny = SamAutomaticMaskGenerator(random_sam(SQUARE), 2, crop_n_layers=2, pred_iou_thresh=99.0)
    assert tiny.generate(np.zeros((5, 5, 3), np.uint8)) == []


@pytest.mark.parametrize("seed", range(5))
def test_suppression_equals_brute_force(seed):
    random = np.random.default_rng(seed)
    corners = random.integers(0, 20, (40, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    scores = random.random(40).round(1)  # with ties
    for threshold in (0.0, 0.3, 0.7):
        assert amg.nms(boxes, scores, threshold).tolist() == brute_nms(boxes, scores, threshold)
    assert amg.nms(boxes[:0], scores[:0], 0.5).shape == (0,)
    for height, threshold, kept in ((7, 0.7, [0, 1]), (6, 0.6, [0])):  # in float32 0.7 is less than it, 0.6 is more
        boxes = np.array([[0, 0, 9, 10], [0, 0, 9, height]])
        assert amg.nms(boxes, np.array([1.0, 0.5]), threshold).tolist() == kept


@pytest.mark.parametrize("size", [(100, 150), (33, 20), (1200, 1800)])
def test_crops_and_grids_equal_the_originals(size):
    peers.segment_anything()
    from segment_anything.utils import amg as original

    for layers in range(3):
        boxes, numbers = original.generate_crop_boxes(size, layers, 512 / 1500)
        found = amg.generate_crop_boxes(size, layers, 512 / 1500)
        assert [box.tolist() for box, _ in found] == boxes and [layer for _, layer in found] == numbers
    for count in (1, 5, 32):
        np.testing.assert_allclose(amg.build_point_grid(count), original.build_point_grid(count))


def test_small_regions_by_hand():
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[3:5, 3:5] = False  # a hole of 4
    mask[11, 10:] = True  # an island of 2
    cleaned, changed = amg.remove_small_regions(mask, 5)
    assert changed and cleaned[1:9, 1:9].all() and cleaned.sum() == 64
    same, changed = amg.remove_small_regions(cleaned, 5)
    assert not changed and (same == cleaned).all()
    kept, changed = amg.remove_small_regions(np.eye(12, dtype=bool)[:4], 30)  # touching by corners is one region
    assert changed and kept.sum() == 4  # the only one stays, which counts; what is around it is one region of 44
    two = np.zeros((40, 40), bool)
    two[:2, :2] = two[10:13, 10:13] = True
    largest, changed = amg.remove_small_regions(two, 100)
    assert changed and largest.sum() == 9


def test_small_regions_equal_the_originals(monkeypatch):
    """The mask, and what counts as changed; SciPy labels the regions in place of OpenCV."""
    peers.segment_anything()
    from segment_anything.utils.amg import remove_small_regions as original

    def components(mask, connectivity):
        regions, sizes = amg._regions(mask)
        return len(sizes), regions, sizes[:, None], None

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(connectedComponentsWithStats=components))
    random = np.random.default_rng(0)
    for _ in range(200):
        mask, area = random.random(random.integers(1, 20, 2)) < random.random() ** 2, int(random.integers(1, 30))
        filled, with_holes = original(mask, area, "holes")
        wanted, with_islands = original(filled, area, "islands")
        cleaned, changed = amg.remove_small_regions(mask, area)
        assert (cleaned == wanted).all() and changed == (with_holes or with_islands)


def test_small_regions_are_cleaned_and_duplicates_go():
    sam, image = random_sam(SQUARE), random_image(3, 40, 60)
    fields = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.95}
    found = SamAutomaticMaskGenerator(sam, min_mask_region_area=60, **fields).generate(image)
    assert found
    for record in found:
        assert (amg.remove_small_regions(record["segmentation"], 60)[0] == record["segmentation"]).all()
        x, y, w, h = record["bbox"]
        assert [x, y, x + w, y + h] == amg.mask_to_box(record["segmentation"]).tolist()
        assert record["area"] == record["segmentation"].sum()


def test_of_duplicates_the_one_that_needed_no_cleaning_stays():
    whole, torn = np.zeros((2, 30, 30), bool)
    whole[5:25, 5:25] = torn[5:25, 5:25] = True
    torn[10:12, 10:12] = False
    boxes, some, one = np.tile([5, 5, 24, 24], (2, 1)), np.array([400, 396]), np.ones(2)
    found = Candidates([None, None], boxes, some, one, one, np.array([[1, 1], [2, 2]]), np.tile([0, 0, 30, 30], (2, 1)))
    generator = SamAutomaticMaskGenerator(random_sam(SQUARE), min_mask_region_area=9)
    for masks in ([whole, torn], [torn, whole]):
        kept, cleaned = generator._without_small_regions(found, masks)
        assert len(cleaned) == 1 and (cleaned[0] == whole).all() and kept.areas.tolist() == [400]
        assert kept.points.tolist() == [[1, 1] if masks[0] is whole else [2, 2]]


def test_grids_may_be_one_array():
    SamAutomaticMaskGenerator(random_sam(SQUARE), points_per_side=None, point_grids=np.full((2, 4, 2), 0.5))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"points_per_side": None}, "either points_per_side or point_grids"),
        ({"point_grids": GRID}, "either points_per_side or point_grids"),
        ({"points_per_side": None, "point_grids": GRID, "hierarchical": True}, "refines a regular grid"),
        ({"covered_thresh": 8.5}, "covered_thresh is of the hierarchical search"),
        (
            {"points_per_side": None, "point_grids": GRID, "crop_n_layers": 1},
            "1 point_grids for 2 layers",
        ),
        ({"output_mode": "png"}, "output_mode 'png' is none of binary_mask"),
        ({"points_per_batch": 0}, "points_per_batch 0 must be at least 1"),
        ({"points_per_side": 0}, "points_per_side 0 must be at least 1"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor 0 must be at least 1"),
    ],
    ids=str,
)
def test_bad_fields_are_refused(fields, line):
    with pytest.raises(InputError, match=line):
        SamAutomaticMaskGenerator(random_sam(SQUARE), **fields)


def test_the_command_writes_coco_that_is_read_again(tmp_path, capsys):
    save(random_sam(SQUARE), tmp_path / "model")
    for i in range(2):
        save_image(tmp_path / "in" / f"{i}.png", 40, 60, seed=i)
    truncated(tmp_path / "in" / "9.jpg")
    fields = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0}
    options = everything.Options(
        tmp_path / "model", (str(tmp_path / "in"),), tmp_path / "out" / "m.json", tmp_path / "s.png", **fields
    )
    everything.everything(options)
    out = capsys.readouterr().out
    assert "9.jpg is not a readable image" in out and "masks of 2 images" in out
    assert np.asarray(Image.open(tmp_path / "s.png")).std() > 10
    samples = data.find([tmp_path / "out" / "m.json"])
    assert [len(sample.annotations()) > 0 for sample in samples] == [True, True]
    assert samples[0].annotations()[0].mask.shape == (40, 60)
    (tmp_path / "none").mkdir()
    truncated(tmp_path / "none" / "9.jpg")
    with pytest.raises(InputError, match="not one of the 1 images can be read"):
        everything.everything(
            everything.Options(tmp_path / "model", (str(tmp_path / "none"),), tmp_path / "n.json", **fields)
        )
    assert not (tmp_path / "n.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truck.jpg", "groceries.jpg"])
def test_real_photographs(name):
    """Nearly every mask of the original has a partner, and the other way round; most survive the hierarchical way."""
    path = shared("teacher/sam_small_256.pth")
    sam = load(path)
    stock = peers.stock_sam(sam.config)
    stock.load_state_dict(torch.load(path, weights_only=True))
    photo = Image.open(shared(f"data/photos/{name}")).convert("RGB")
    photo.thumbnail((512, 512))
    image, fields = np.asarray(photo), {"points_per_side": 16, "pred_iou_thresh": 0.35, "stability_score_thresh": 0.55}
    found = SamAutomaticMaskGenerator(sam, **fields).generate(image)
    wanted = peers.mask_generator(stock, brute_nms, **fields).generate(image)
    assert len(wanted) > 3
    assert matched(wanted, found) >= 0.98 and matched(found, wanted) >= 0.98
    fewer = SamAutomaticMaskGenerator(sam, hierarchical=True, **fields).generate(image)
    assert matched(found, fewer) >= 0.9
