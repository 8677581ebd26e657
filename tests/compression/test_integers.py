"""A distillation after quantising: codes stay, what is beside them learns, and the result is a model of integers."""

from __future__ import annotations

import dataclasses

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
from slimsam_jax.compression.steps import Distill, Optimizer, Prune, Validation
from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import encode
from slimsam_jax.quantization import is_quantized
from slimsam_jax.quantize.__main__ import choices, main

SMALL = tiny_config(image_size=(64, 64), decoder_depth=1, multimask_outputs=1)
SMALL = dataclasses.replace(SMALL, blocks=SMALL.blocks[:1])


def mend() -> Distill:
    return Distill("none", optimizer=Optimizer(steps=2, lr=1e-2), validation=Validation(1, keep_checkpoint="last"))


@pytest.fixture(scope="module")
def models(material, tmp_path_factory):
    """A model, it in integers, and these after two steps, as the run's folder gives them."""
    sam, folder = random_sam(SMALL, 1), tmp_path_factory.mktemp("integers")
    checkpoint.save(sam, folder / "float")
    step = Quantize(activations=8, arithmetic="integer", balance=0.75, head=False, images=2)
    options = compress_options(material, folder / "out", teacher=folder / "float", recipe="default", set=())
    run = prepare(options, sam, (step, mend()))
    with run.folder:
        trained, _ = carry_out(run)
        return sam, run.folder.load_model("quantize", "model"), trained


def leaves_of(sam):
    return flatten_dict(sam.params, sep="/")


def test_codes_stay_and_the_rest_learns(models):
    _, before, after = map(leaves_of, models)
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
    sam, before, after = models
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8), np.array([[64, 50]])
    plain, old, new = (np.asarray(encode(each.config, each.params, *image)) for each in (sam, before, after))
    error = lambda embedding: np.square(embedding - plain).mean() / plain.var()
    assert error(old) != error(new) < 0.1
    in_floats = lambda leaf: dataclasses.replace(leaf, integer=False) if is_quantized(leaf) else leaf
    params = jax.tree.map(in_floats, after.params, is_leaf=is_quantized)
    np.testing.assert_allclose(new, encode(after.config, params, *image), atol=1e-5)


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
