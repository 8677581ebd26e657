"""A distillation after quantising: codes stay, what is beside them learns, and the result is a model of integers."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers.models import random_sam, tiny_config
from helpers.runs import compress_options
from slimsam_jax import checkpoint
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.pipeline import carry_out
from slimsam_jax.compression.plan import check, names, optimizer_steps
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.step_training import StepTraining
from slimsam_jax.compression.steps import Distill, Optimizer, Prune, Validation
from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import encode
from slimsam_jax.quantization import is_quantized, training
from slimsam_jax.quantize.__main__ import choices, main

SMALL = tiny_config(image_size=(64, 64), decoder_depth=1, multimask_outputs=1)
SMALL = dataclasses.replace(SMALL, blocks=SMALL.blocks[:1])


def mend() -> Distill:
    return Distill("none", optimizer=Optimizer(steps=2, lr=1e-2), validation=Validation(1, keep_checkpoint="last"))


RECIPE = (Quantize(4, activations=8, arithmetic="integer", balance=0.75, head=False, images=2), mend())


@pytest.fixture(scope="module")
def models(material, tmp_path_factory):
    """A model, it in integers, and these after two steps, as the run's folder gives them; the folder."""
    sam, folder = random_sam(SMALL, 1), tmp_path_factory.mktemp("integers")
    checkpoint.save(sam, folder / "float")
    run = prepare(options_of(material, folder / "out"), sam, RECIPE)
    with run.folder:
        trained, _ = carry_out(run)
        return sam, run.folder.load_model("quantize", "model"), trained, folder / "out"


def options_of(material, out, **changes):
    fields = {"teacher": out.parent / "float", "recipe": "default", "set": (), "save_every": 1}
    return compress_options(material, out, **fields, **changes)


def leaves_of(sam):
    return flatten_dict(sam.params, sep="/")


def test_codes_stay_and_the_rest_learns(models):
    _, before, after = map(leaves_of, models[:3])
    integers = [path for path, leaf in before.items() if is_quantized(leaf)]
    assert len(integers) == 9 and all(path.startswith("image_encoder") for path in integers)
    for path in integers:
        old, new = before[path], after[path]
        np.testing.assert_array_equal(old.codes, new.codes)
        bare = lambda node: dataclasses.replace(node, codes=0, scale=0, range=0, divisor=0)
        assert bare(old) == bare(new)
        assert 0 < np.abs(np.asarray(old.scale) / new.scale - 1).max() < 0.03
        if old.range is not None:
            assert old.range[1] == new.range[1] and 0 < abs(old.range[0] / new.range[0] - 1) < 0.03
    moved = [path for path in set(before) - set(integers) if not np.array_equal(before[path], after[path])]
    assert {path.split("/")[0] for path in moved} == {"image_encoder"} and len(moved) > 10


def test_it_computes_with_integers_as_before(models):
    sam, before, after, _ = models
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8), np.array([[64, 50]])
    plain, old, new = (np.asarray(encode(each.config, each.params, *image)) for each in (sam, before, after))
    error = lambda embedding: np.square(embedding - plain).mean() / plain.var()
    assert error(new) < error(old) < 0.1
    in_floats = lambda leaf: dataclasses.replace(leaf, integer=False) if is_quantized(leaf) else leaf
    params = jax.tree.map(in_floats, after.params, is_leaf=is_quantized)
    np.testing.assert_allclose(new, encode(after.config, params, *image), atol=1e-5)


def test_a_resumed_run_ends_the_same_to_the_bit(models, material):
    """As if it had been killed after its first step."""
    sam, _, trained, finished = models
    out = shutil.copytree(finished, finished.parent / "again")
    for part in ("steps/2", "best", "last", "model"):
        shutil.rmtree(out / "checkpoints" / "distill" / part)
    run = prepare(options_of(material, out, resume=True), sam, RECIPE)
    with run.folder:
        again, _ = carry_out(run)
    chex.assert_trees_all_equal(again.params, trained.params)
    assert (out / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    assert [entry["step"] for entry in run.folder.read_log() if "score" in entry] == [0, 2]  # the start is judged, too


def test_validations_share_a_program(models, monkeypatch):
    """That which joins integers with what was learned."""
    traced, joined = [], training.joined
    monkeypatch.setattr(training, "joined", lambda *parts: traced.append(parts) or joined(*parts))
    _, student, *_ = models
    learned = {"image_encoder": training.learnable(student.params["image_encoder"])}
    for _ in range(2):
        found = StepTraining.sam(SimpleNamespace(student=student), SimpleNamespace(average=None, params=learned))
    assert len(traced) <= 1  # none, where the fixture's run has compiled it
    chex.assert_trees_all_equal(found.params, student.params)


def test_an_image_that_cannot_be_read_is_named_by_a_training_that_meets_it():
    """Or else by the step that met it: a short training does not meet all."""
    cut, learn = (SimpleNamespace(optimizer_steps=count) for count in (0, 3))
    named = lambda images: Run.is_named_later(SimpleNamespace(plan=(cut, learn), batch=4, images=range(images)), cut)
    assert named(12) and not named(13)
    assert not Run.is_named_later(SimpleNamespace(plan=(cut, cut), batch=4, images=range(2)), cut)


def test_what_may_come_after_quantize():
    recipe = RECIPES["integers"]
    check(recipe)
    assert names(recipe)[-2:] == ["quantize", "distill-2"]
    for wrong in (Prune("embedding"), Quantize(), dataclasses.replace(mend(), batch_norm="auto")):
        with pytest.raises(InputError, match="after Quantize"):
            check((*recipe, wrong))


def test_a_step_may_say_how_many_optimizer_steps_it_takes():
    recipe = RECIPES["integers"]
    assert optimizer_steps(recipe, 50, 4) == [0, 0, 150, 0, 100]
    assert optimizer_steps(recipe, 10**7, 4, each=7) == [0, 0, 14, 0, 100]
    assert optimizer_steps(recipe, 50, 4, each=0) == [0] * 5


def test_what_is_set_of_both_distillations_of_a_recipe():
    """Each has its own number of steps, and batch norms are of the first alone."""
    of = lambda *settings: [step for step in change(RECIPES["integers"], settings) if isinstance(step, Distill)]
    first, mended = of("distill.steps=200", "distill.batch_norm=auto", "distill.lr=1e-3")
    assert (first.optimizer.steps, mended.optimizer.steps) == (0, 200)
    assert (first.batch_norm, mended.batch_norm) == ("auto", "frozen")
    assert first.optimizer.lr == mended.optimizer.lr == 1e-3
    assert change(RECIPES["default"], ["distill.steps=7"])[-1].optimizer.steps == 7
    with pytest.raises(InputError, match="leave batch_norm frozen after Quantize"):
        choices(Quantize(), ("distill.batch_norm=auto",), 7)
    with pytest.raises(InputError, match=r"add quantize\.float_weights=0$"):
        of("quantize.head=false")
    assert change(RECIPES["integers"], ["quantize.head=false", "quantize.float_weights=0"])


def test_the_program_distils_if_it_has_steps(tmp_path):
    (alone,) = choices(Quantize(4), ("group=32",))
    step, mended = choices(Quantize(4), ("group=32", "distill.lr=1e-3"), 7)
    assert alone == step == Quantize(4, group=32)
    assert (mended.optimizer.steps, mended.optimizer.lr) == (7, 1e-3)
    with pytest.raises(InputError, match="steps -1 must be at least 0"):
        choices(Quantize(), (), -1)
    with pytest.raises(InputError, match="no such step"):
        choices(Quantize(), ("distill.lr=1e-3",))
    with pytest.raises(InputError, match="--resume continues a run with --steps"):
        main(tmp_path, tmp_path / "out", resume=True)
