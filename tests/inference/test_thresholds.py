"""Thresholds of everything mode: a model's own, on disk, and chosen by images without labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import peers
from helpers.images import samples, save_image, truncated
from helpers.models import SQUARE, random_sam
from slimsam_jax import calibrate as command
from slimsam_jax import checkpoint, data, everything
from slimsam_jax.compression import pipeline
from slimsam_jax.errors import InputError
from slimsam_jax.inference import calibration
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.calibration import Scores, Shares, calibrate, fitting
from slimsam_jax.models.config import Thresholds

SOME = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.25, "stability_score_offset": 2.0}


OFFSET = 1e-3  # of random weights logits are small


def estimating(seed: int, middle: float, spread: float = 0.1):
    """A random SAM whose predicted IoUs lie about `middle`."""
    sam = random_sam(SQUARE, seed)
    decoder = sam.params["mask_decoder"]
    head = decoder["iou_prediction_head"]
    last = {"kernel": spread * head["layers_2"]["kernel"], "bias": np.full(4, middle, np.float32)}
    head = {**head, "layers_2": last}
    return dataclasses.replace(sam, params={**sam.params, "mask_decoder": {**decoder, "iou_prediction_head": head}})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """As large as the model's frame, so that masks are measured there and in the image alike."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        save_image(folder / f"{i}.png", 64, 64, seed=i)
    truncated(folder / "0_broken.jpg")
    return samples(sorted(folder.iterdir()))


def passing(sam, images) -> int:
    """How many masks everything mode keeps before it drops duplicates."""
    generator = SamAutomaticMaskGenerator(sam, calibration.GRID, box_nms_thresh=1.0)
    return sum(len(generator.generate(sample.image())) for sample in images if "broken" not in sample.name)


def test_a_folder_carries_them_and_old_ones_have_none(tmp_path):
    sam = random_sam(SQUARE)
    checkpoint.save(sam, tmp_path)
    assert "thresholds" not in json.loads((tmp_path / "config.json").read_text())
    assert checkpoint.load(tmp_path).thresholds is None
    checkpoint.save(dataclasses.replace(sam, thresholds=Thresholds(**SOME)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["thresholds"] == SOME
    assert checkpoint.load(tmp_path).thresholds == Thresholds(**SOME)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -0.1, 1.5, True, "0.5", None, 10**400, [0.5], {}], ids=str
)
@pytest.mark.parametrize("name", SOME)
def test_hostile_values_are_refused(tmp_path, name, value):
    if name == "stability_score_offset" and value == 1.5:
        value = 0
    checkpoint.save(random_sam(SQUARE), tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "thresholds": {**SOME, name: value}}))
    with pytest.raises(InputError, match=f"{name} .* is no number between 0 and") as error:
        checkpoint.load(tmp_path)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("record", [[], 0.5, "all", {}, {"pred_iou_thresh": 0.5}, {**SOME, "box": 1}], ids=str)
def test_only_all_three_are_thresholds(record):
    with pytest.raises(ValueError, match="all three, and nothing else"):
        Thresholds.from_json(record)


def test_the_generator_takes_the_models_unless_told_otherwise():
    own = dataclasses.replace(random_sam(SQUARE), thresholds=Thresholds(**SOME))
    taken = lambda sam, **fields: {name: getattr(SamAutomaticMaskGenerator(sam, 4, **fields), name) for name in SOME}
    assert taken(own) == SOME
    assert taken(own, stability_score_thresh=0.0) == {**SOME, "stability_score_thresh": 0.0}
    assert taken(random_sam(SQUARE)) == dataclasses.asdict(Thresholds()) == {**SOME, **taken(random_sam(SQUARE))}
    assert Thresholds() == Thresholds(0.88, 0.95, 1.0)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
        min_size=2,
        max_size=60,
        unique_by=(lambda p: p[0], lambda p: p[1]),
    ),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
)
@settings(max_examples=200, deadline=None)
def test_as_many_pass_as_wanted(pairs, one, of_those):
    found = Scores(*(np.array(values) / (10**6 + 1) for values in zip(*pairs, strict=True)))
    wanted = Shares(one, one * of_those)
    kept = found.passing(fitting(found, wanted))
    assert kept.sum() == max(1, round(wanted.both * len(pairs)))
    least = max(kept.sum(), round(one * len(pairs)))
    assert set(np.flatnonzero(kept)) <= set(np.argsort(-found.predicted_iou)[:least])
    rest = [i for i in np.argsort(-found.predicted_iou)[:least] if not kept[i]]
    assert not rest or found.stability[rest].max() < found.stability[kept].min()


def test_slim_and_teacher_pass_equally_many(images):
    teacher, slim = estimating(0, 0.4), estimating(1, 0.5)
    found = calibration.scores(teacher, images, OFFSET)
    thresholds = fitting(found, Shares(0.6, 0.3), OFFSET)
    teacher = dataclasses.replace(teacher, thresholds=thresholds)
    wanted = passing(teacher, images)
    assert abs(wanted - 0.3 * len(found.stability)) <= 2
    uncalibrated = dataclasses.replace(slim, thresholds=thresholds)
    assert abs(passing(uncalibrated, images) - wanted) > 20
    calibrated = dataclasses.replace(slim, thresholds=calibrate(slim, images, like=teacher))
    assert abs(passing(calibrated, images) - wanted) <= 2  # of 576
    assert calibrate(slim, images, like=estimating(0, 0.4)) is None  # of which SAM's own let nothing pass
    usual = dataclasses.replace(slim, thresholds=calibrate(calibrated, images))
    assert abs(passing(usual, images) - calibration.USUAL.both * len(found.stability)) <= 2


def test_a_slim_model_without_masks_is_not_lost(images, monkeypatch, capsys):
    """At the end of a run, before the model is written."""
    teacher = dataclasses.replace(estimating(0, 0.4), thresholds=Thresholds(**SOME))
    few = Scores(np.array([0.9]), np.array([0.9]))
    monkeypatch.setattr(calibration, "scores", lambda sam, *_: few if sam is teacher else Scores(*np.zeros((2, 0))))
    found = pipeline.calibrated(SimpleNamespace(images=images, teacher=teacher), random_sam(SQUARE))
    assert found.thresholds == teacher.thresholds and "the model has no masks" in capsys.readouterr().out


def test_images_are_spread_and_unreadable_ones_passed_by(images, tmp_path):
    asked = []
    watched = [dataclasses.replace(s, load=lambda s=s: (asked.append(Path(s.name).name), s.load())[1]) for s in images]
    for count, names in ((2, ["0.png", "2.png"]), (3, ["0.png", "0_broken.jpg", "2.png", "1.png"])):
        asked.clear()
        found = calibration.scores(random_sam(SQUARE), watched, images=count)
        assert asked == names and len(found.stability) == count * 3 * calibration.GRID**2
    with pytest.raises(InputError, match="none of the 1 images can be read"):
        calibration.scores(random_sam(SQUARE), samples([truncated(tmp_path / "a.jpg")]))


def test_the_command_writes_thresholds_and_nothing_else(images, tmp_path, capsys):
    checkpoint.save(estimating(0, 0.4), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    folder = str(tmp_path / "in")
    for i in range(2):
        save_image(tmp_path / "in" / f"{i}.png", 64, 64, seed=i)
    command.main(tmp_path / "model", (folder,))
    assert "pred_iou_thresh 0." in capsys.readouterr().out
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    assert Thresholds.from_json(after.pop("thresholds")) != Thresholds() and after == description
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="lets no mask pass"):
        checkpoint.save(random_sam(SQUARE), tmp_path / "strict")
        command.main(tmp_path / "model", (folder,), like=tmp_path / "strict")
    with pytest.raises(InputError, match="is no model folder"):
        command.main(tmp_path / "sam.pth", (folder,))
    with pytest.raises(InputError, match="--count 0"):
        command.main(tmp_path / "model", (folder,), count=0)


@pytest.mark.parametrize(
    ("own", "fields", "options"),
    [
        (None, {}, {"--pred-iou-thresh", "--stability-score-thresh"}),
        (Thresholds(0.0, 1.0, 0.2), {}, {"--stability-score-thresh"}),
        (Thresholds(0.0, 0.0, OFFSET), {"pred_iou_thresh": 0.9}, {"--pred-iou-thresh"}),
    ],
    ids=["of the model", "of the model, strict", "asked"],
)
def test_who_gets_no_mask_is_told_what_to_lower(tmp_path, capsys, own, fields, options):
    sam, folder = dataclasses.replace(estimating(0, 0.4), thresholds=own), str(tmp_path / "in")
    checkpoint.save(sam, tmp_path / "model")
    save_image(tmp_path / "in" / "0.png", 64, 64, seed=0)
    start = everything.Options(tmp_path / "model", (folder,), tmp_path / "m.json", points_per_side=4, **fields)
    everything.everything(start)
    *_, said, told = capsys.readouterr().out.splitlines()
    assert "0 masks of 1 images" in said
    found = calibration.scores(sam, data.find([folder]), own.stability_score_offset if own else 1.0)
    assert f"the best predicted IoU is {found.predicted_iou.max():.2f}" in told
    assert f"the best stability is {found.stability.max():.2f}" in told
    assert ("slimsam_jax.calibrate" in told) == (own is None)
    words = told.rpartition("lower to, say, ")[2].partition(";")[0].split()
    assert set(words[::2]) == options
    lower = {name[2:].replace("-", "_"): float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    everything.everything(dataclasses.replace(start, **lower))
    assert "no mask was kept" not in capsys.readouterr().out


def test_exports_that_cannot_hold_them_say_so(tmp_path):
    peers.segment_anything()  # without torchvision
    from converters import model_card, slim_sam_torch

    sam = dataclasses.replace(random_sam(SQUARE), thresholds=Thresholds(**SOME))
    for name, model, said in (("own", sam, True), ("none", random_sam(SQUARE), False)):
        checkpoint.save(model, tmp_path / name)
        card = model_card.text(model, model, name, tmp_path / name)
        arguments = "pred_iou_thresh=0.5, stability_score_thresh=0.25, stability_score_offset=2"
        assert (f'pipeline("mask-generation", model=...)(image, {arguments})' in card) == said
        assert slim_sam_torch.load(tmp_path / name).thresholds == (SOME if said else {})


@pytest.mark.slow
def test_the_model_that_ships_finds_something_in_nine_of_ten_photographs():
    sam = checkpoint.load(data.embedded_teacher())
    assert sam.thresholds
    generator = SamAutomaticMaskGenerator(sam, points_per_side=8)  # of 32, so that few are asked
    found = [len(generator.generate(sample.image())) for sample in data.find([data.embedded_images()])[:20]]
    assert np.mean(np.array(found) > 0) >= 0.9
