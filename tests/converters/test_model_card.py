"""The README.md of a Hugging Face folder: true numbers or none, nothing of the machine, an example that runs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re

import numpy as np
import pytest
from PIL import Image

from converters import model_card, to_torch
from helpers.models import UNEVEN, random_sam
from slimsam_jax import checkpoint
from slimsam_jax.data import embedded_teacher

REPORT = {
    "teacher": {"encoder_parameters": 4406464, "point_miou": 0.3931},
    "slim": {"encoder_parameters": 829683, "point_miou": 0.39154},
    "agreement": 0.9478,
    "images": 100,
    "annotated_images": 99,
    "provenance": {
        "teacher": {"file": "teacher.pth", "sha256": "1a85"},
        "images": {"count": 200},
        "options": {"teacher": "/machine/teacher.pth", "images": ["/machine/photos"], "ratio": 0.77},
        "versions": {"slimsam_jax": "0.1.0", "jax": "0.10.2"},
    },
}


def test_the_card_tells_what_the_run_reached(tmp_path):
    from huggingface_hub import ModelCard

    sam = dataclasses.replace(random_sam(UNEVEN), provenance=REPORT["provenance"])
    checkpoint.save(sam, tmp_path / "slim")
    (tmp_path / "slim" / "report.json").write_text(json.dumps(REPORT))
    to_torch.main(tmp_path / "slim", tmp_path / "hf", "hf", pad_to_uniform=True)
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "mask-generation"
    for text in (
        "| encoder parameters | 4.41 M | 0.83 M |\n| point mIoU | 39.31 % | 39.15 % |\n| agreement with the teacher",
        "Measured by the run that made it, before padding, on 100 images, 99 of them with annotations.",
        "python -m slimsam_jax.compress --teacher teacher.pth --images photos --ratio 0.77",
        "Compressed from `teacher.pth` (sha256 `1a85`) with\n200 images:",
        "slimsam_jax 0.1.0, jax 0.10.2",
    ):
        assert text in card.text
    assert "machine" not in card.text


def test_the_card_of_what_no_run_of_ours_made(tmp_path, uneven):
    """No report, or the report of another model: no numbers."""
    for name in ("hf", "hf again"):
        to_torch.main(uneven, tmp_path / name, "hf", pad_to_uniform=True)
        text = (tmp_path / name / "README.md").read_text()
        assert "## Numbers" not in text and "Converted from `random`." in text and "Made slim" not in text
        (uneven / "report.json").write_text(json.dumps(REPORT))


@pytest.mark.parametrize("start", ["random weights", "first.pth"])
def test_the_card_of_a_model_that_was_trained(uneven, start):
    init = None if start == "random weights" else {"file": start, "provenance": {}}
    origin = {"init": init, "images": {"count": 7}, "options": {"steps": 3}, "versions": {}}
    sam = dataclasses.replace(checkpoint.load(uneven), provenance=origin)
    text = model_card.text(sam, sam, "hf", uneven)
    assert f"Trained on masks of 7 images, from\n`{start}`." in text and "Made slim" not in text


BEGUN = {"file": "first.pth"}
TRAINING = {"init": None, "decoder": None, "options": {}}


@pytest.mark.parametrize(
    ("provenance", "said"),
    [
        (TRAINING, "began as random ones"),
        ({"training": TRAINING, "history": "words"}, "began as random ones"),
        (TRAINING | {"init": BEGUN}, "derive from those of `first.pth`"),
        (TRAINING | {"decoder": BEGUN}, "derive from those of `first.pth`"),
        ({"training": TRAINING | {"init": BEGUN}, "history": "words"}, "stay under those of what their training began"),
        ({"training": {"teacher": BEGUN, "options": {}}, "history": "words"}, "derive from those of `first.pth`"),
        ({"source": "sam_b.pth", "sha256": "1a85", "history": "words"}, "derive from those of `sam_b.pth`"),
        ({"source": "random weights"}, "began as random ones"),
    ],
)
def test_weights_are_under_the_terms_of_what_they_were_made_from(provenance, said):
    text = model_card.licence(provenance)
    assert said in text and ("Meta's own" in text) == ("derive" in said)


def test_the_card_of_the_model_that_ships_names_its_licence():
    provenance = json.loads((embedded_teacher() / "config.json").read_text())["provenance"]
    assert "the weights are Apache-2.0." in model_card.origin(provenance)


@pytest.mark.slow
def test_the_card_understands_the_report_of_a_run(finished, tmp_path):
    to_torch.main(finished, tmp_path / "hf", "hf", pad_to_uniform=True)
    text = (tmp_path / "hf" / "README.md").read_text()
    report = json.loads((finished / "report.json").read_text())
    assert f"| {100 * report['teacher']['point_miou']:.2f} % | {100 * report['slim']['point_miou']:.2f} % |" in text
    assert "python -m slimsam_jax.compress --teacher teacher" in text and "--images images --val val" in text
    assert str(finished.parent) not in text and "None" not in text
    assert all(len(line) <= 120 or line.startswith("python") for line in text.splitlines())


def test_the_card_keeps_a_command_without_its_machine():
    options = {"teacher": "/data/sam b.pth", "images": ["tfds:/data/prepared", "/x/sa_0.tar"], "uniform": True}
    options |= {"ratio": 0.77, "budget": None, "set": ["multiple=8"], "cache": True, "seed": 0}
    expected = "python -m slimsam_jax.compress --teacher 'sam b.pth' --images tfds:prepared sa_0.tar --uniform"
    assert model_card.command(options) == f"{expected} --ratio 0.77 --set multiple=8"


def test_the_example_of_the_card_runs(uneven, tmp_path, monkeypatch):
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    to_torch.main(uneven, tmp_path / "hf", "hf", pad_to_uniform=True)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((40, 52, 3), np.uint8)).save("image.jpg")
    example = re.search(r"```python\n(.*?)```", (tmp_path / "hf" / "README.md").read_text(), re.DOTALL)[1]
    exec(example, names := {})
    assert names["masks"].shape == (1, 3, 40, 52)
    assert type(AutoModelForMaskGeneration.from_pretrained("hf")).__name__ == "SamModel"
    assert type(AutoProcessor.from_pretrained("hf")).__name__ == "SamProcessor"


def test_the_card_says_what_the_pipeline_needs(uneven, tmp_path):
    from transformers import pipeline

    to_torch.main(uneven, tmp_path / "hf", "hf", pad_to_uniform=True)
    assert 'model="hf")` finds all masks of an image. It needs torchvision' in (tmp_path / "hf/README.md").read_text()
    made = pipeline("mask-generation", model=str(tmp_path / "hf"), device="cpu")
    ask = functools.partial(made, Image.new("RGB", (52, 40)), points_per_batch=512, pred_iou_thresh=-9.0)
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ImportError, match="Torchvision"):
            ask()
    else:
        assert "masks" in ask()
