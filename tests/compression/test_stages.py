"""What a recipe makes of the paper's two stages, and the terms of the loss besides features."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax.compression import widths
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.pipeline import drawn_anew
from slimsam_jax.compression.recipes import RECIPES, Recipe
from slimsam_jax.compression.steps import STAGES, plan, steps_of
from slimsam_jax.compression.trainer import _student_features, _target_features, make_trainer, run_encoder
from slimsam_jax.data.prompted import random_clicks
from slimsam_jax.distillation.losses import mse
from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import decode
from slimsam_jax.training.setup import some_of


@pytest.mark.parametrize(
    "choices",
    [{}, {"rounds": 3}, {"polish": 0.25}, {"rounds": 2, "polish": 0.5}, {"alternate": False, "polish": 0.1}],
)
def test_steps_and_cuts_add_up(choices):
    stages = plan(Recipe(**{"alternate": True, **choices}))
    assert len({stage.name for stage in stages}) == len(stages)
    assert math.isclose(sum(stage.share for stage in stages), 2)
    for each in (5, 7, 100):
        steps = steps_of(stages, each)
        assert sum(steps.values()) == 2 * each and all(steps[stage.name] for stage in stages if stage.share)
    for kind in ("embedding", "bottleneck"):
        assert math.isclose(sum(stage.cut for stage in stages if stage.cuts == kind), 1)


def test_steps_are_shared_out_evenly():
    assert list(steps_of(plan(Recipe(alternate=True, rounds=3)), 5).values()) == [2, 1, 2, 2, 1, 2]


def test_the_papers_recipes_have_the_papers_stages():
    assert plan(RECIPES["slimsam"]) == plan(RECIPES["taylor"]) == STAGES
    assert steps_of(STAGES, 7) == {"embedding": 7, "bottleneck": 7} and set(steps_of(STAGES, 0).values()) == {0}


def test_all_cuts_first_and_one_distillation():
    recipe = RECIPES["default"]
    first, second = plan(recipe)
    assert steps_of((first, second), 100) == {"embedding": 0, "bottleneck": 200}
    assert (first.cuts, second.cuts) == ("embedding", "bottleneck") and second.aligns(recipe)
    weights = [second.terms(step, 200, recipe) for step in (0, 50, 100, 199)]
    np.testing.assert_allclose([w["embedding"] for w in weights], [1 / 11, 6 / 11, 1, 1])
    np.testing.assert_allclose([w.get("stream", 0) for w in weights], [10 / 11, 5 / 11, 0, 0])


@pytest.mark.parametrize("recipe", [Recipe(align=0), dataclasses.replace(RECIPES["taylor"], alternate=False)])
def test_where_nothing_is_worth_aligning_with_the_embedding_alone_counts(recipe):
    _, second = plan(recipe)
    assert not second.aligns(recipe) and second.terms(0, 200, recipe) == {"embedding": 1.0}


def test_features_can_weigh_less_than_in_the_paper():
    recipe = Recipe(align=0.5)
    assert plan(recipe)[1].terms(0, 200, recipe) == pytest.approx({"embedding": 6 / 11, "stream": 5 / 11})
    recipe = dataclasses.replace(RECIPES["taylor"], align=0.5)
    first, second = (stage.terms(0, 100, recipe) for stage in STAGES)
    assert first == {"embedding": 0.75, "qkv_window": 0.25, "qkv_global": 0.25, "mlp": 0.25}
    assert second == pytest.approx({"embedding": 6 / 11, "stream": 5 / 11, "previous": 5 / 11})
    with pytest.raises(InputError, match=r"align 1\.5 is not a share of the paper's weight"):
        recipe.change(["align=1.5"])


def test_terms_besides_features():
    recipe = Recipe(align=0, cosine=0.5, masks=2.0)
    assert STAGES[0].terms(0, 10, recipe) == {"embedding": 1.0, "direction": 0.5, "masks": 2.0}
    assert set(STAGES[0].terms(0, 10, Recipe())) == {"embedding", "qkv_window", "qkv_global", "mlp"}


def test_equal_cuts_in_a_row_leave_what_one_leaves():
    part = Target(0.77).part(1 / 3)
    np.testing.assert_allclose((1 - part.ratio) ** 3, 0.23)
    assert Target(0.5).part(1.0) == Target(0.5)


def test_rounds_together_leave_every_block_its_least():
    """A block worth nothing keeps a quarter of the even cut's width, however many rounds get there."""
    for rounds in (1, 2, 3):
        config, part = tiny_config(mlp_dim=400), 1 / rounds
        recipe = Recipe(least=0.25**part, compete="kind")
        for _ in range(rounds):
            worth = {
                f"blocks_{i}/{kind}": np.full(width, 1.0 if i else 1e-9)
                for i in range(2)
                for kind, width in (("attn", config.blocks[i].head_dim), ("mlp", config.blocks[i].mlp_dim))
            }
            target = Target(0.77).part(part)
            config = widths.with_widths(config, widths.bottleneck_widths(config, worth, target, recipe, False))
        assert abs(config.blocks[0].mlp_dim - 0.25 * 0.23 * 400) <= 2


def test_too_few_steps_are_refused():
    with pytest.raises(InputError, match="4 steps are too few for the 6 stages"):
        steps_of(plan(Recipe(rounds=3, alternate=True)), 2)


def test_some_images_are_drawn_by_seed():
    images = list(range(50))
    drawn = [some_of(images, 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted(set(drawn[0])) and len(drawn[0]) == 10
    assert some_of(images, None, 0) == some_of(images, 99, 0) == images


def test_weights_drawn_anew_keep_the_widths():
    sam = random_sam(tiny_config())
    new = drawn_anew(sam, 0)
    shapes = lambda params: jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes(new.params) == shapes(sam.params)
    assert new.params["mask_decoder"] is sam.params["mask_decoder"]
    kernel = lambda sam: sam.params["image_encoder"]["blocks_0"]["attn"]["q"]["kernel"]
    assert not np.allclose(kernel(new), kernel(sam))


def batch_with_clicks(count: int) -> dict[str, np.ndarray]:
    batch = random_images(tiny_config())
    clicks = [random_clicks(size, count, np.random.default_rng(0)) for size in batch["size"]]
    return batch | {name: np.stack([each[name] for each in clicks]) for name in clicks[0]}


def features_of(recipe: Recipe, stage=STAGES[0]):
    """Student's and target's, of a batch with clicks."""
    teacher, student = random_sam(tiny_config()), random_sam(tiny_config(embed_dim=23), seed=1)
    batch = batch_with_clicks(recipe.points)
    trainer = make_trainer(student, teacher, teacher, stage, recipe)
    encode = lambda config, encoder, batch: run_encoder(config, encoder, batch)
    student_features = jax.jit(functools.partial(_student_features, encode, student.config, stage, recipe))
    target_features = jax.jit(functools.partial(_target_features, encode, *2 * [teacher.config], stage, recipe))
    found = student_features(student.params, trainer.frozen, batch)
    wanted = target_features(trainer.frozen, batch)
    return teacher, batch, found, wanted


def test_directions_are_told_apart_by_their_cosine():
    _, _, found, wanted = features_of(Recipe(cosine=1.0))
    one, other = found["embedding"], wanted["embedding"]
    cosine = (one * other).sum(-1) / jnp.linalg.norm(one, axis=-1) / jnp.linalg.norm(other, axis=-1)
    expected = 2 * (1 - cosine).mean() / one.shape[-1]
    np.testing.assert_allclose(mse(found["direction"], wanted["direction"]), expected, rtol=1e-5)


def test_masks_are_those_of_the_decoder_for_each_click():
    teacher, batch, found, wanted = features_of(Recipe(masks=1.0, points=3))
    assert found["masks"].shape == wanted["masks"].shape == (2 * 3, 4, 16, 12)
    for image in range(2):
        logits, iou = decode(
            teacher.config, teacher.params, wanted["embedding"][image], batch["points"][image], batch["labels"][image]
        )
        rows = slice(3 * image, 3 * image + 3)
        np.testing.assert_allclose(wanted["masks"][rows], jax.nn.sigmoid(logits), atol=1e-5)
        np.testing.assert_allclose(wanted["iou"][rows], iou, atol=1e-5)


def test_clicks_lie_on_the_picture():
    clicks = random_clicks(np.array([40, 7]), 500, np.random.default_rng(0))
    xy = clicks["points"][clicks["labels"] == 1]
    assert len(xy) == 500 and (xy >= 0).all() and (xy < [7.5, 40.5]).all() and (xy.max(0) > [6, 36]).all()


def test_the_decoder_learns_in_the_end():
    recipe = Recipe(polish=0.5, masks=1.0, tune_decoder=True, keep="last", learning_rate=1e-3)
    *_, polish = plan(recipe)
    assert [stage.trains for stage in plan(recipe)] == [("image_encoder",)] * 2 + [("image_encoder", "mask_decoder")]
    teacher, batch = random_sam(tiny_config()), batch_with_clicks(recipe.points)
    student = random_sam(tiny_config(embed_dim=23), seed=1)
    trainer = make_trainer(student, student, teacher, polish, recipe)
    terms = polish.terms(0, 10, recipe)
    assert terms == {"embedding": 1.0, "masks": 1.0, "iou": 1.0}
    state, _ = trainer.step(trainer.state, trainer.frozen, batch, terms, 1e-3)
    before, after = (jax.tree.leaves(params["mask_decoder"]) for params in (student.params, state.params))
    assert any(np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True))


def test_a_later_round_aligns_what_was_cut_before():
    """Bottlenecks that an earlier round has narrowed are compared with those of the model before this cut."""
    teacher = random_sam(tiny_config())
    blocks = tuple(dataclasses.replace(block, head_dim=9, mlp_dim=30) for block in teacher.config.blocks)
    previous = random_sam(dataclasses.replace(teacher.config, embed_dim=20, blocks=blocks))
    student = random_sam(dataclasses.replace(previous.config, embed_dim=15))
    trainer = make_trainer(student, previous, teacher, STAGES[0], Recipe(rounds=2, alternate=True))
    terms = STAGES[0].terms(0, 10, Recipe(rounds=2, alternate=True))
    _, found = trainer.step(trainer.state, trainer.frozen, random_images(teacher.config), terms, 1e-3)
    assert np.isfinite(found["loss"]) and found["mlp"] > 0
