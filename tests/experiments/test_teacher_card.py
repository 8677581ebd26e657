"""The model that ships, its card and its curves: what is written of a training and of what its model knows."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from converters import model_card
from experiments import reference_results, results, ship, teacher_card
from helpers.models import SQUARE, random_sam
from slimsam_jax import checkpoint, data
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.inference.calibration import USUAL, Shares, fitting, scores


@pytest.fixture(autouse=True)
def committed(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "check_committed", lambda: None)
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path / "tables")
    monkeypatch.setattr(teacher_card, "FILE", tmp_path / "card.jsonl")
    monkeypatch.setattr(reference_results, "FILE", tmp_path / "reference.jsonl")
    monkeypatch.setattr(results, "FIGURE_FOLDER", tmp_path / "figures")


def test_a_shipped_model_is_the_trained_one_in_half_the_bytes(material, tmp_path):
    options = {"composites": "/home/me/pack", "val": ["/home/me/val"], "init": "/home/me/first", "steps": 3}
    before = {"init": None, "options": {"images": ["/home/me/pics"]}}
    first = {"file": "first", "provenance": {"decoder": {"file": "x", "provenance": before}, "options": {}}}
    origin = {"init": first, "images": {"count": 7}, "options": options, "dtype": "float32"}
    trained = dataclasses.replace(random_sam(SQUARE), provenance=origin)
    checkpoint.save(trained, tmp_path / "trained")
    ship.main(tmp_path / "trained", tmp_path / "shipped", (str(material / "images"),), count=2, shares=(0.5, 0.25))
    shipped = checkpoint.load(tmp_path / "shipped")
    before, after = (checkpoint.flax.traverse_util.flatten_dict(sam.params) for sam in (trained, shipped))
    assert all(np.array_equal(np.float16(before[name]), after[name]) for name in before)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("shipped", "trained")]
    assert sizes[0] < 0.6 * sizes[1]
    found = scores(shipped, data.find([material / "images"]), images=2)
    assert shipped.thresholds == fitting(found, Shares(0.5, 0.25)) != fitting(found, USUAL)
    assert "/home" not in (tmp_path / "shipped" / "config.json").read_text()
    training = shipped.provenance["training"]
    wanted = {"composites": "pack", "val": ["val"], "init": "first", "steps": 3, "images": [], "decoder": []}
    assert training["options"] == wanted
    assert training["init"]["provenance"]["decoder"]["provenance"]["options"]["images"] == ["pics"]
    sha256 = checkpoint.sha256(tmp_path / "trained")
    assert (shipped.provenance["source"], shipped.provenance["sha256"]) == ("trained", sha256)
    card = model_card.text(shipped, shipped, "hf", tmp_path / "shipped")
    assert "Trained on masks of 7 images, from\n`first`." in card and "derive from those of `first`" in card
    words = ship.origin(tmp_path / "trained", origin, "random weights: 9 steps, then 3 from their average")
    told = dataclasses.replace(shipped, provenance=words)
    card = model_card.text(told, told, "hf", tmp_path / "shipped")
    assert "of 7 images, from\nrandom weights: 9 steps, then 3 from their average." in card and "`first`" not in card
    with pytest.raises(InputError, match="not empty"):
        ship.main(tmp_path / "trained", tmp_path / "shipped")
    with pytest.raises(InputError, match="0 < second <= first <= 1"):
        ship.main(tmp_path / "trained", tmp_path / "another", shares=(0.1, 0.2))


@pytest.mark.parametrize("origin", [{"source": "sam_b.pth"}, {"teacher": {"file": "sam_b.pth"}, "options": {}}])
def test_a_history_is_of_a_training(origin, tmp_path):
    checkpoint.save(dataclasses.replace(random_sam(SQUARE), provenance=origin), tmp_path / "made")
    with pytest.raises(InputError, match="--history is of a training, and made comes from none"):
        ship.main(tmp_path / "made", tmp_path / "shipped", history="random weights: 9 steps")
    assert not (tmp_path / "shipped").exists()


def test_weights_that_float16_cannot_hold_are_refused(material, tmp_path):
    sam = random_sam(SQUARE)
    sam.params["mask_decoder"]["iou_token"] = np.full_like(sam.params["mask_decoder"]["iou_token"], 1e5)
    checkpoint.save(sam, tmp_path / "trained")
    with np.errstate(over="ignore"), pytest.raises(InputError, match="not finite"):
        ship.main(tmp_path / "trained", tmp_path / "shipped", (str(material / "images"),), count=1)


def test_a_card_says_what_a_model_says_of_its_masks(material, monkeypatch):
    ious = {"point": [[0.5, 0.2, 0.8], [0.7, 0.4, 0.4]], "box": [[0.9, 0.0, 0.0], [0.7, 0.0, 0.0]]}
    said = np.array([[0.6, 0.2, 0.7], [0.6, 0.4, 0.6]])
    sides = [SimpleNamespace(mask=np.arange(100).reshape(10, 10) < count) for count in (1, 25)]
    monkeypatch.setattr(teacher_card, "read_annotated", lambda _: (Image.new("RGB", (10, 10)), sides))
    monkeypatch.setattr(teacher_card, "of_prompt", lambda *args: (np.array(ious[args[-1]]), said))
    monkeypatch.setattr(teacher_card, "click_ious", lambda *_: np.array([[0.6, 0.7, 0.7, 0.8, 0.8]] * 2))
    for _ in range(2):  # the second has nothing to do
        teacher_card.run((material / "teacher",), (str(material / "val"),), limit=1)
    (entry,) = results.read(teacher_card.FILE)
    assert entry["images"] == 1 and entry["data"] == "val"
    teacher_card.table()
    line = (results.TABLE_FOLDER / "teacher_card.md").read_text().splitlines()[-1]
    first = "| teacher | 1 of val | 60.0 | 80.0 | 60.0 | 70.0, 70.0, 80.0, 80.0 |"
    # two objects of 1/100 and 1/4 of the image
    assert entry["by_side"] == [[0, None, None], [1, 0.5, 0.9], [1, 0.7, 0.7]]
    assert (
        line.startswith(first)
        and line.endswith("| , 50.0, 70.0; , 90.0, 70.0 | 51.7, 50.0 | 8.3, 10.0 |")
        and line.count("|") == 10
    )


def test_masks_are_measured_against_what_is_annotated(material, monkeypatch):
    """The single mask is what is annotated, and the other three are what is not."""
    sam = checkpoint.load(material / "teacher")
    (sample, *_) = data.find([material / "val"])
    outputs = [np.stack([a.mask, ~a.mask, ~a.mask, ~a.mask]) for a in read_annotated(sample)[1]]
    said = np.tile([0.75, 0.125, 0.125, 0.125], (len(outputs), 1))
    monkeypatch.setattr(teacher_card, "decode_prompts", lambda *_: (outputs, said))
    monkeypatch.setattr(teacher_card, "original_masks", lambda _sam, _encoded, masks: masks)
    numbers = teacher_card.measure(sam, [sample])
    assert (numbers["point_miou"], numbers["box_miou"], numbers["oracle_miou"]) == (1, 1, 0)
    assert (numbers["true"], numbers["predicted"]) == (0.25, 0.28125)
    assert (numbers["off_by"], numbers["single_off_by"]) == (0.15625, 0.25)
    assert len(numbers["clicks"]) == teacher_card.CLICKS and numbers["clicks"][0] != numbers["clicks"][1]


def test_a_training_that_was_stopped_keeps_its_curve_and_no_path(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    options = {"composites": "/home/me/pack", "val": ["/home/me/val"], "steps": 9, "batch": 2, "prompts": 1}
    (folder / "checkpoints" / "origin.json").write_text(json.dumps({"options": options}))
    lines = [{"step": 2, "score": 0.5, "point_miou": 0.4, "box_miou": 0.6}, {"step": 3, "loss": 1.0}, {"skipped": "a"}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reference_results.record("small v2", folder, minutes=61, after=7)
    assert "/home" not in reference_results.FILE.read_text()
    reference_results.table()
    line = (results.TABLE_FOLDER / "reference.md").read_text().splitlines()[-1]
    assert line == "| small v2 | 3 x 2 x 1 | 61 | 2: 40.0 / 60.0 |"
    assert (results.FIGURE_FOLDER / "teacher.png").read_bytes().startswith(b"\x89PNG")


def test_tables_call_the_first_small_teacher_by_its_own_name():
    assert results.called("sam_small_256") == "small v1" and results.called("vit_b") == "vit_b"
