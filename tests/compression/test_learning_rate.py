"""The learning rate that follows what a cut has lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from converters.from_torch import load
from helpers.images import samples, truncated
from helpers.runs import compress_options, shaken
from slimsam_jax.compression.distill import Distillation, peak_rate, starting_error
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.distillation.schedules import learning_rates
from slimsam_jax.errors import RunError
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.inference.decode import encode_image


def prepared(material, tmp_path, **choices):
    options = compress_options(material, tmp_path / "slim", **choices)
    return prepare(options, load(options.teacher))


def rate(run, student) -> float:
    return peak_rate(run, run.plan[-1], lambda: starting_error(run, student))


def test_it_goes_with_the_root_of_the_embeddings_error(material, tmp_path):
    run = prepared(material, tmp_path, set=("distill.auto_lr=1e-4",))
    student, errors = shaken(run.teacher), []
    for sample in run.images:
        found, wanted = (np.asarray(encode_image(sam, sample.image()).embedding) for sam in (student, run.teacher))
        errors.append(np.square(found - wanted).mean() / wanted.var())
    assert len(run.images) > 1 and min(errors) > 0
    np.testing.assert_allclose(rate(run, student), 1e-4 * np.sqrt(np.mean(errors)), rtol=1e-5)


def test_it_has_a_limit(material, tmp_path):
    run = prepared(material, tmp_path, set=("distill.auto_lr=1e3",))
    assert rate(run, shaken(run.teacher)) == 2e-3


def test_a_resumed_stage_goes_on_with_the_rate_it_had(material, tmp_path):
    run = prepared(material, tmp_path)
    first = rate(run, shaken(run.teacher))
    assert rate(run, run.teacher) == first
    (entry,) = run.folder.read_log()
    assert entry == {"stage": "distill-2", "step": 0, "learning_rate": first}
    assert peak_rate(run, run.plan[1], lambda: 0.0) == 0  # another step, nothing lost


@pytest.mark.parametrize("given", [1e-3, "auto"])
def test_it_reaches_the_step(material, tmp_path, given):
    """The one that was given, and otherwise the one that is logged."""
    run = prepare(
        compress_options(material, tmp_path / "slim", set=(f"distill.lr={given}",)), load(material / "teacher")
    )
    distillation = Distillation(run, run.plan[-1], shaken(run.teacher), run.teacher)
    wanted = run.folder.read_log()[0]["learning_rate"] if given == "auto" else given
    assert wanted > 0
    assert bool(run.folder.read_log()) == (given == "auto")
    rates = []
    note = lambda state, frozen, batch, weights, rate: (rates.append(rate), (state, {"loss": 1.0}))[1]
    distillation.trainer = distillation.trainer._replace(step=note)
    for step in range(1, 9):
        distillation.step(None, step, {})
    np.testing.assert_array_equal(rates, learning_rates(wanted, 8))


def test_it_is_halved_on_a_plateau(material, tmp_path):
    """By the scores until then, which a resumed run reads in its log."""
    run = prepare(
        compress_options(material, tmp_path / "slim", set=("distill.schedule=plateau", "distill.lr=1e-3")),
        load(material / "teacher"),
    )
    distillation = Distillation(run, run.plan[-1], run.teacher, run.teacher)
    distillation.scores = {step: 0.9 for step in range(1, 6)}  # the best and four more, the stage's patience
    assert distillation.learning_rate(6) == 1e-3
    distillation.scores[6] = 0.8
    assert distillation.learning_rate(7) == 5e-4


def test_it_is_chosen_on_images_that_can_be_read(material, tmp_path):
    run = prepared(material, tmp_path)
    (broken,) = samples([truncated(tmp_path / "broken.jpg")])
    student, one = shaken(run.teacher), run.images[0]
    alone = starting_error(dataclasses.replace(run, images=[one]), student)
    assert starting_error(dataclasses.replace(run, images=[broken, one]), student) == alone
    with pytest.raises(RunError, match=r"not one of 1 images can be read, such as .*broken\.jpg"):
        starting_error(dataclasses.replace(run, images=[broken]), student)
    found, wanted = (encode_image(sam, one.image()).embedding for sam in (student, run.teacher))
    assert alone == relative_error(found, wanted)
