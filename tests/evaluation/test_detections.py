"""COCO AP of a detector's boxes, and clicks: against the original predictor, driven by hand."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pycoco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from converters.from_torch import from_state_dict, load
from helpers.images import save_image, write_annotation
from helpers.models import random_sam, tiny_config
from helpers.peers import segment_anything, state_dict, stock_sam
from helpers.programs import run_program
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.data import Annotation, find
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation import clicks, detections, figures, resampled_ap
from slimsam_jax.evaluation.compare import Measured, measure_models
from slimsam_jax.evaluation.scores import Protocols
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.transforms import resized_shape
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.config import preset


def predictor(module: torch.nn.Module, image: Image.Image):
    """The original's, with an image set; its own `set_image` needs torchvision."""
    made = segment_anything().SamPredictor(module)
    height, width = resized_shape((image.height, image.width), (module.image_encoder.img_size,) * 2)
    pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    made.set_torch_image(torch.from_numpy(pixels).permute(2, 0, 1)[None], (image.height, image.width))
    return made


def test_the_best_of_a_boxs_masks_is_the_highest_ranked(monkeypatch):
    """By predicted IoU the second of three, by EdgeSAM's stability, say, the third."""
    masks = np.arange(4)[:, None, None] == np.arange(4).reshape(2, 2)
    monkeypatch.setattr(detections, "decode_prompts", lambda *_: (masks[None], np.array([[0.9, 0.1, 0.8, 0.7]])))
    monkeypatch.setattr(detections, "original_masks", lambda sam, encoded, low: low)
    sam, box = random_sam(tiny_config()), detections.Detection(np.array([0.0, 0, 1, 1]), 1, 0.5)
    for best, ranking in ((2, detections.ranking), (3, lambda sam, low, predicted: np.arange(4))):
        monkeypatch.setattr(detections, "ranking", ranking)
        results = detections.segment(sam, None, 7, [box])
        found = {choice: rle.decode(result["segmentation"], (2, 2)) for choice, (result,) in results.items()}
        np.testing.assert_array_equal(found[""], masks[0])
        np.testing.assert_array_equal(found["_best"], masks[best])


def write_coco(folder: Path, samples, random: np.random.Generator) -> tuple[Path, Path]:
    """Ground truth beside copies of the images, and a detector that is a little wrong: (truth, boxes)."""
    images, annotations, boxes = [], [], []
    for number, sample in enumerate(samples, 1):
        image = sample.image()
        name = f"{number}.png"
        image.save(folder / name)
        images.append({"id": number, "file_name": name, "height": image.height, "width": image.width})
        for annotation in sample.annotations():
            x0, y0, x1, y1 = map(float, annotation.box)
            common = {"image_id": number, "category_id": 1 + len(annotations) % 2}
            found = {"id": len(annotations) + 1, "area": int(annotation.mask.sum()), "iscrowd": 0}
            bbox = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({**common, **found, "bbox": bbox, "segmentation": rle.encode(annotation.mask)})
            noisy = [*random.normal(bbox[:2], 2), *(np.array(bbox[2:]) * random.uniform(0.9, 1.1, 2))]
            boxes.append({**common, "bbox": noisy, "score": float(random.random())})
    categories = [{"id": 1, "name": "odd"}, {"id": 2, "name": "even"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder / "truth.json", folder / "boxes.json"


@pytest.mark.slow
def test_ap_equals_that_of_the_original_predictor(tmp_path):
    checkpoint_path = shared("teacher/sam_small_256.pth")
    samples = find([shared("data/bsds_val")])[:12]
    truth, boxes = write_coco(tmp_path, samples, np.random.default_rng(0))
    found = detections.read_boxes(boxes)
    measured = measure_models([load(checkpoint_path)], find([truth]), Protocols(()), boxes=found)
    ids = [sample.image_id for sample in measured.samples.values()]
    ours = detections.precisions(detections.read_truth(truth, found), list(measured.results.values()), ids)
    module = stock_sam(preset("small"))
    module.load_state_dict(torch.load(checkpoint_path, weights_only=True))
    of_original = original_precisions(module, truth, json.loads(boxes.read_text()))
    for expected, suffix in zip(of_original, ("", "_best"), strict=True):
        assert expected > 0.1  # something is at stake
        assert ours[f"boxes/ap{suffix}"][0]["mean"] == pytest.approx(expected, abs=0.001)


def original_precisions(module: torch.nn.Module, path: Path, boxes: list[dict]) -> list[float]:
    """AP of the single mask, and of the most promising of three, box by box."""
    results: tuple[list, list] = [], []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        for image_id, image in truth.imgs.items():
            original = predictor(module, Image.open(path.parent / image["file_name"]))
            for box in (box for box in boxes if box["image_id"] == image_id):
                x, y, width, height = box["bbox"]
                for several, found in enumerate(results):
                    masks, scores, _ = original.predict(
                        box=np.array([x, y, x + width, y + height]), multimask_output=bool(several)
                    )
                    mask = pycoco.encode(np.asfortranarray(masks[scores.argmax()].astype(np.uint8)))
                    same = {key: box[key] for key in ("image_id", "category_id", "score")}
                    found.append(same | {"segmentation": mask})
        return [judged(truth, found) for found in results]


def judged(truth: COCO, found: list[dict]) -> float:
    judge = COCOeval(truth, truth.loadRes(found), "segm")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats[0]


def test_clicks_equal_those_of_the_original_predictor():
    """Five clicks on a random SAM, each with all before it and the previous mask's logits."""
    config = tiny_config(image_size=(64, 64))
    module = stock_sam(config)
    sam = from_state_dict(state_dict(module))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    truth = np.zeros((40, 30), bool)
    truth[10:30, 5:25] = True
    box = np.array([5.0, 10, 25, 30])
    annotation = Annotation(1, truth, box, box[:2], box)
    ious = clicks.click_ious(sam, encode_image(sam, image), [annotation], 5)[0]

    original, prompts, low, mask = predictor(module, image), clicks._no_clicks(1, 5), None, np.zeros_like(truth)
    for k in range(5):
        assert clicks._add_click(prompts, 0, k, mask, truth)
        masks, _, low = original.predict(
            prompts.points[0, : k + 1], prompts.labels[0, : k + 1], mask_input=low, multimask_output=False
        )
        mask = masks[0]
        assert ious[k] == pytest.approx((mask & truth).sum() / (mask | truth).sum(), abs=0.01)
    assert len({tuple(point) for point in prompts.points[0, :5]}) == 5


@pytest.mark.parametrize(
    "given",
    [{"area": 1600, "iscrowd": 0}, {}, {"id": 0}, {"id": 7}],
    ids=["whole", "without area", "of id 0", "of equal ids"],
)
def test_average_precision_by_hand(tmp_path, given):
    """Of two objects of one category, one is found exactly, with the higher score; the other's mask is elsewhere."""
    masks = np.zeros((3, 100, 100), bool)
    masks[0, :40, :40], masks[1, 60:, 60:], masks[2, 50:52, :5] = True, True, True
    annotations = [
        {"id": i + 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 40], **given}
        | {"segmentation": rle.encode(mask)}
        for i, mask in enumerate(masks[:2])
    ]
    content = {"images": [{"id": 7, "file_name": "x.png", "height": 100, "width": 100}], "annotations": annotations}
    (tmp_path / "t.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "thing"}]}))
    truth = detections.read_truth(tmp_path / "t.json", {7: []})
    results = [
        {"image_id": 7, "category_id": 1, "score": score, "segmentation": rle.encode(masks[i])}
        for i, score in ((0, 0.9), (2, 0.8))
    ]
    found = detections.measures(detections.judge(truth, results, [7]))
    # Precision is 1 up to a recall of 0.5, and 0 beyond: 51 of 101 recall thresholds.
    assert found["ap"] == pytest.approx(51 / 101) and found["ap_medium"] == pytest.approx(51 / 101)
    assert "ap_small" not in found and "ap_large" not in found


@pytest.fixture(scope="module")
def coco_set(tmp_path_factory):
    """A model, and three images of which two have an object each."""
    folder = tmp_path_factory.mktemp("coco")
    sources = folder / "sources"
    for i in range(3):
        save_image(sources / f"{i}.png", seed=i)
    write_annotation(sources / "0.png")
    write_annotation(sources / "1.png")
    write_coco(folder, find([sources]), np.random.default_rng(0))
    checkpoint.save(random_sam(tiny_config()), folder / "model")
    return folder


@pytest.fixture(scope="module")
def crowd():
    """Twelve images of two objects of two categories: (truth, results of a good and of a bad detector)."""
    random, annotations, results = np.random.default_rng(0), [], ([], [])
    for image_id in range(12):
        for category in (1, 2):
            mask = np.zeros((60, 60), bool)
            y, x = random.integers(0, 40, 2)
            mask[y : y + 20, x : x + 20] = True
            common = {"image_id": image_id, "category_id": category}
            fields = {"id": len(annotations) + 1, "bbox": [0, 0, 1, 1], "segmentation": rle.encode(mask)}
            annotations.append(common | fields | {"area": 400, "iscrowd": int(image_id == 3)})
            for found, most in zip(results, (4, 12), strict=True):
                moved = np.roll(mask, random.integers(0, most, 2), (0, 1))
                found.append(common | {"score": float(random.random()), "segmentation": rle.encode(moved)})
    truth = COCO()
    images = [{"id": i, "height": 60, "width": 60} for i in range(12)]
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1}, {"id": 2}]}
    truth.createIndex()
    return truth, results


def test_resampled_precision_is_that_of_coco(crowd):
    """Of all images once, and of every subset of them."""
    truth, results = crowd
    for found in results:
        each = resampled_ap.categories(detections.judge(truth, found, range(12)))
        for chosen in (range(12), range(5), (2, 3, 7, 11)):
            expected = detections.measures(detections.judge(truth, found, chosen))["ap"]
            times = np.isin(np.arange(12), chosen).astype(int)
            assert 0 < expected < 1 and resampled_ap.precision(each, times) == pytest.approx(expected, abs=1e-12)
            assert resampled_ap.precision(each, 3 * times) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(resampled_ap.precision(each, np.eye(12)[3]))  # a crowd only


def test_intervals_of_precision_are_paired(crowd):
    truth, (good, bad) = crowd
    images = [
        [{choice: [one for one in model if one["image_id"] == i] for choice in ("", "_best")} for model in models]
        for models in [(good, good, bad)]
        for i in range(12)
    ]
    same, worse = detections.precisions(truth, images, range(12), resamples=200)["boxes/ap"][1:]
    assert same["difference"] == 0 and same["difference_interval"] == [0, 0]
    low, high = worse["difference_interval"]
    assert low < worse["difference"] < high < 0
    assert worse["interval"][0] < worse["mean"] < worse["interval"][1]
    again = detections.precisions(truth, images, range(12), resamples=200)["boxes/ap"]
    other = detections.precisions(truth, images, range(12), seed=1, resamples=200)["boxes/ap"]
    assert again[2] == worse != other[2]


def test_command_reports_ap_beside_a_protocol(coco_set, tmp_path, monkeypatch, capsys):
    arguments = ("--model", coco_set / "model", "--data", coco_set / "truth.json", "--boxes", coco_set / "boxes.json")
    outputs = ("--json", tmp_path / "x.json", "--protocol", "box")
    code, text, error = run_program(monkeypatch, capsys, "evaluate", *arguments, *outputs)
    assert code == 0, error
    result = json.loads((tmp_path / "x.json").read_text())
    assert {"boxes/ap", "boxes/ap_best", "box/iou"} <= set(result["results"]) and "boxes AP50" in text
    assert result["data"]["images"] == 3 and result["results"]["box/iou"]["model"]["images"] == 2
    arguments = (*arguments, "--no-costs")  # whose milliseconds differ
    code, text, _ = run_program(monkeypatch, capsys, "evaluate", *arguments)
    assert code == 0 and "box mIoU" not in text and "MACs" not in text
    shutil.copytree(coco_set, tmp_path / "folder")
    (tmp_path / "folder" / "truth.json").rename(tmp_path / "folder" / "annotations.json")
    arguments = [tmp_path / "folder" if argument == coco_set / "truth.json" else argument for argument in arguments]
    assert run_program(monkeypatch, capsys, "evaluate", *arguments)[:2] == (0, text)


def test_one_line_for_boxes_that_do_not_fit(coco_set, tmp_path, monkeypatch, capsys):
    (tmp_path / "not.json").write_text('{"a": 1}')
    (tmp_path / "other.json").write_text('[{"image_id": 99, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}]')
    (tmp_path / "negative.json").write_text('[{"image_id": 1, "category_id": 1, "bbox": [1, 1, -5, 5], "score": 1}]')
    good = {"--model": coco_set / "model", "--data": coco_set / "truth.json", "--boxes": coco_set / "boxes.json"}
    for changes, message in (
        ({"--data": coco_set / "sources"}, "--boxes needs one COCO .json as --data"),
        ({"--boxes": tmp_path / "no.json"}, "no.json does not exist"),
        ({"--boxes": tmp_path / "not.json"}, "not.json cannot be read"),
        ({"--boxes": tmp_path / "other.json"}, "none of the boxes is of an image in"),
        ({"--boxes": tmp_path / "negative.json"}, "a box that is none"),
        ({"--figure": tmp_path / "x.png"}, "--figure needs a --protocol"),
    ):
        arguments = [part for pair in (good | changes).items() for part in pair]
        code, _, error = run_program(monkeypatch, capsys, "evaluate", *arguments)
        assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize("change", [{"iscrowd": 1}, {"category_id": 9}], ids=str)
def test_truth_without_an_object_is_refused(coco_set, tmp_path, change):
    truth = json.loads((coco_set / "truth.json").read_text())
    truth["annotations"] = [fields | change for fields in truth["annotations"]]
    (tmp_path / "t.json").write_text(json.dumps(truth))
    with pytest.raises(InputError, match=r"t\.json has no object of a category to compare masks with"):
        detections.read_truth(tmp_path / "t.json", {1: []})


def test_images_without_an_object_or_a_score_are_one_line(crowd, tmp_path):
    truth, (results, _) = crowd
    of_a_crowd = {choice: [one for one in results if one["image_id"] == 3] for choice in ("", "_best")}
    with pytest.raises(InputError, match="none of the images that can be read has an object to compare masks with"):
        detections.precisions(truth, [[of_a_crowd]], [3], resamples=2)
    with pytest.raises(InputError, match="no score per image to draw: measure by a protocol too"):
        figures.draw(["model"], [None], Measured({}, {"3": [{}]}, {}, "", {}), Protocols(("box",)), tmp_path / "x.png")


def test_pycocotools_is_asked_for(coco_set, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(InputError, match=r"pip install 'slimsam_jax\[coco\]'"):
        detections.read_truth(coco_set / "truth.json", {1: []})
