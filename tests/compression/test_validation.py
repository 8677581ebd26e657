"""What a student is scored by while it learns, and which one is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from converters import from_torch
from helpers.images import samples, truncated
from helpers.runs import compress_options, shaken
from slimsam_jax.api import compress_with
from slimsam_jax.compression import prepare as preparation
from slimsam_jax.compression import validation
from slimsam_jax.compression.step_training import StepTraining
from slimsam_jax.compression.steps import Distill
from slimsam_jax.compression.validation import validator
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.evaluation.compare import compare_models
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.training import loop
from slimsam_jax.training.run_folder import RunFolder


def test_error_is_that_of_the_embedding(material):
    teacher, images = from_torch.load(material / "teacher"), samples(sorted((material / "images").iterdir()))
    score, student = validator(teacher, images, "error"), shaken(teacher)
    errors = [
        relative_error(*(encode_image(sam, sample.image()).embedding for sam in (student, teacher)))
        for sample in images
    ]
    np.testing.assert_allclose(score(student), -np.mean(errors), rtol=1e-6)
    assert score(teacher) == 0


def test_miou_takes_annotations_or_the_teachers_masks(material):
    teacher = from_torch.load(material / "teacher")
    annotated, bare = (samples(sorted((material / name).glob("*.png"))) for name in ("val", "images"))
    found = compare_models(teacher, shaken(teacher), annotated)
    assert validator(teacher, annotated, "miou")(shaken(teacher)) == pytest.approx(found["slim"]["point"])
    agreement = compare_models(teacher, shaken(teacher), bare)["agreement"]
    assert validator(teacher, bare, "miou")(shaken(teacher)) == pytest.approx(agreement)
    assert validator(teacher, bare, "miou")(teacher) == 1


def test_images_that_cannot_be_used_are_left_out(material, tmp_path):
    teacher, images = from_torch.load(material / "teacher"), samples(sorted((material / "images").iterdir()))
    (broken,) = samples([truncated(tmp_path / "a.jpg")])
    assert validator(teacher, [broken, *images], "error")(shaken(teacher)) == validator(teacher, images, "error")(
        shaken(teacher)
    )
    with pytest.raises(InputError, match=r"no image can be validated on: .*a\.jpg"):
        validator(teacher, [broken], "error")


def test_images_that_go_bad_while_it_learns_are_left_out(material, tmp_path, capsys):
    """The run goes on, measured on the rest, and says so once; without any image it ends, to be resumed."""
    paths = [Path(shutil.copy(path, tmp_path)) for path in sorted((material / "images").iterdir())[:3]]
    teacher, images, unread = from_torch.load(material / "teacher"), samples(paths), {}
    judge, rest = validator(teacher, images, "error", unread), validator(teacher, images[1:], "error")
    student = shaken(teacher)
    whole, expected = judge(student), rest(student)
    paths[0].unlink()
    run = SimpleNamespace(scores={"error": judge}, unread=unread)
    planned = SimpleNamespace(name="distill", step=Distill())
    training = SimpleNamespace(whole=run, planned=planned, folder=RunFolder(tmp_path / "out", {}))
    for step in (2, 4):
        assert StepTraining.score(training, student, step) == {"score": expected} != {"score": whole}
    (entry,) = training.folder.read_log()
    assert (entry["stage"], entry["step"], entry["skipped"]) == ("distill", 2, str(paths[0]))
    assert capsys.readouterr().out == f"not measured: {entry['reason']}\n"
    for path in paths[1:]:
        path.unlink()
    with pytest.raises(RunError, match=r"after step 6 .* or no image to measure on can be read any more"):
        StepTraining.score(training, student, 6)
    training.folder.release()


def test_so_many_images_are_enough(material, monkeypatch):
    teacher, images = from_torch.load(material / "teacher"), samples(sorted((material / "images").iterdir()))
    alone = validator(teacher, images[:1], "error")(shaken(teacher))
    assert validator(teacher, images, "error")(shaken(teacher)) != alone
    monkeypatch.setattr(validation, "IMAGES", 1)
    assert validator(teacher, images, "error")(shaken(teacher)) == alone


class Nothing(loop.Loop):
    """A training that does nothing."""

    stream = weights = learning_rate = sam = score = None


def test_when_what_is_done():
    made = lambda steps, validations: Nothing(None, None, loop.Schedule("x", "x", steps, 2, 5, validations))
    assert made(7, 3).validated == {3, 5, 7} and made(2, 5).validated == {1, 2}
    assert made(7, 3).logged == set(range(8)) and made(1000, 3).logged == set(range(0, 1001, 10))


def test_of_equal_scores_the_later_is_the_best():
    nothing = Nothing(None, None, loop.Schedule("x", "x", 8, 2, 5, 4))
    nothing.scores = {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.4}
    assert nothing.best() == 6


@pytest.mark.slow
def test_best_and_last_are_both_kept(material, tmp_path, monkeypatch, unmeasured):
    """With scores that fall from validation to validation the first is the best."""
    scores = iter(range(0, -100, -1))
    monkeypatch.setattr(preparation, "validator", lambda *_: lambda sam: float(next(scores)))
    choices = ("distill.validations=2", "distill.keep_checkpoint=last", "distill.schedule=plateau", "distill.lr=1e-3")
    compress_with(compress_options(material, tmp_path / "slim", set=choices))
    last, best = (from_torch.load(path) for path in (tmp_path / "slim", tmp_path / "slim" / "best"))
    assert last.config == best.config and best.provenance == last.provenance
    assert not np.array_equal(*(sam.params["image_encoder"]["pos_embed"] for sam in (last, best)))
