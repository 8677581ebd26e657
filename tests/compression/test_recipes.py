"""Steps and recipes: how steps are shared out, what the terms of the loss weigh, and what is set by name."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recipes as lists
from helpers.models import random_images, random_sam, tiny_config
from helpers.runs import compress_options
from slimsam_jax import api
from slimsam_jax.api import compress_with
from slimsam_jax.compression import widths
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.loss_terms import aligns
from slimsam_jax.compression.loss_terms import terms as terms_of
from slimsam_jax.compression.pipeline import initialize
from slimsam_jax.compression.plan import check, describe, names, optimizer_steps
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import FIELDS, change
from slimsam_jax.compression.steps import Distill, Initialize, Losses, Optimizer, Prune, Quantize, Quirks, Validation
from slimsam_jax.compression.trainer import _student_features, _target_features, make_trainer, run_encoder
from slimsam_jax.data.prompted import random_clicks
from slimsam_jax.distillation.losses import mse
from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import decode
from slimsam_jax.training.setup import some_of


@pytest.mark.parametrize("name", lists.RECIPES)
def test_steps_and_cuts_add_up(name):
    recipe = lists.RECIPES[name](0.77)
    check(recipe)
    assert len(set(names(recipe))) == len(recipe)
    for each in (5, 7, 100):
        steps = optimizer_steps(recipe, 1000, 4, each)
        own = sum(step.optimizer.steps for step in recipe if hasattr(step, "optimizer"))
        assert sum(steps) == 2 * each + own
        assert [bool(count) for count in steps] == [hasattr(step, "optimizer") for step in recipe]
    for part in ("embedding", "bottleneck"):
        cuts = [step.ratio or 0.77 for step in recipe if isinstance(step, Prune) and step.part == part]
        np.testing.assert_allclose(1 - np.prod(1 - np.array(cuts)), 0.77 if cuts else 0)


def test_steps_are_shared_out_evenly():
    recipe = lists.progressive(0.5, rounds=3)
    assert optimizer_steps(recipe, 1000, 4, 5) == [0, 2, 0, 1, 0, 2] * 2
    assert optimizer_steps(RECIPES["default"], 1000, 4) == [0, 0, 3000]
    assert optimizer_steps(RECIPES["slimsam"], 10_000, 4) == [0, 50_000] * 2  # the paper's 20 epochs


def test_steps_are_called_by_what_they_do():
    assert names(RECIPES["default"]) == ["prune-embedding", "prune-bottleneck", "distill"]
    assert names(RECIPES["taylor"]) == ["prune-embedding", "distill", "prune-bottleneck", "distill-2"]


def test_late_choices_are_recorded_where_they_are_made():
    """A run begun before there were such is resumed: what it recorded of its recipe is what is recorded now."""
    assert "steps" not in describe(RECIPES["default"])[-1]["optimizer"]
    *_, quantize, distill = describe(RECIPES["integers"])
    assert "balance" not in quantize and distill["optimizer"]["steps"] == 100
    assert describe([Quantize(activations=8, balance=0.75)])[0]["balance"] == 0.75
    first = {"weights", "activations", "group", "method", "ranges", "float_inputs", "arithmetic", "head"}
    first |= {"float_weights", "fine_weights", "images"}  # what a run of integers recorded when there were such
    assert set(describe([Quantize()])[0]) == {"step"} | first


def test_recipes_of_the_paper():
    """Alternate slimming: 20 epochs each by plain MSE at 1e-4, with every known bug; ours without."""
    for recipe in (RECIPES["slimsam"], RECIPES["taylor"]):
        assert [getattr(step, "part", None) or step.align for step in recipe] == [
            "embedding",
            "bottleneck",
            "bottleneck",
            "stream+embedding",
        ]
    for step in RECIPES["slimsam"]:
        assert all(dataclasses.astuple(step.quirks))
    assert [RECIPES["slimsam"][i].optimizer for i in (1, 3)] == [
        Optimizer(20, 1e-4, schedule="plateau", patience=patience, reduction="sum") for patience in (3, 4)
    ]
    assert all(step.quirks == Quirks() for step in RECIPES["taylor"])


def test_all_cuts_first_and_one_distillation():
    *cuts, distill = RECIPES["default"]
    assert [step.part for step in cuts] == ["embedding", "bottleneck"] and aligns(distill)
    weights = [terms_of(distill, step, 200) for step in (0, 50, 100, 199)]
    np.testing.assert_allclose([w["embedding"] for w in weights], [1 / 11, 6 / 11, 1, 1])
    np.testing.assert_allclose([w.get("stream", 0) for w in weights], [10 / 11, 5 / 11, 0, 0])


@pytest.mark.parametrize("distill", [Distill(losses=Losses(features=0)), lists.one_shot(0.5)[-1]])
def test_where_nothing_is_worth_aligning_with_the_embedding_alone_counts(distill):
    assert not aligns(distill) and terms_of(distill, 0, 200) == {"embedding": 1.0}


def test_features_can_weigh_less_than_in_the_paper():
    half = Losses(features=0.5)
    first, second, once = (Distill(align, losses=half) for align in ("bottleneck", "stream+embedding", "stream"))
    assert terms_of(once, 0, 200) == pytest.approx({"embedding": 6 / 11, "stream": 5 / 11})
    assert terms_of(first, 0, 100) == {"embedding": 0.75, "qkv_window": 0.25, "qkv_global": 0.25, "mlp": 0.25}
    assert terms_of(second, 0, 100) == pytest.approx({"embedding": 6 / 11, "stream": 5 / 11, "previous": 5 / 11})


def test_terms_besides_features():
    distill = Distill("bottleneck", losses=Losses(features=0, direction=0.5, masks=2.0))
    assert terms_of(distill, 0, 10) == {"embedding": 1.0, "direction": 0.5, "masks": 2.0}
    assert set(terms_of(Distill("bottleneck"), 0, 10)) == {"embedding", "qkv_window", "qkv_global", "mlp"}


def test_several_cuts_leave_every_block_its_least():
    """A block worth nothing keeps a quarter of the even cut's width, however many cuts get there."""
    for rounds in (1, 2, 3):
        config = tiny_config(mlp_dim=400)
        for step in lists.progressive(0.77, rounds):
            if not isinstance(step, Prune) or step.part == "embedding":
                continue
            worth = {
                f"blocks_{i}/{kind}": np.full(width, 1.0 if i else 1e-9)
                for i in range(2)
                for kind, width in (("attn", config.blocks[i].head_dim), ("mlp", config.blocks[i].mlp_dim))
            }
            step = dataclasses.replace(step, allocation="global")
            wanted = widths.target_of(step, Target(0.77))
            config = widths.with_widths(config, widths.bottleneck_widths(config, worth, wanted, step, False))
        assert abs(config.blocks[0].mlp_dim - 0.25 * 0.23 * 400) <= 2


def test_too_few_steps_are_refused():
    with pytest.raises(InputError, match="4 steps are too few for the 6 distillations"):
        optimizer_steps(lists.progressive(0.5, rounds=3), 1000, 4, 2)


def test_what_trainings_have_in_common_is_set_in_all_of_them():
    first, embedding, masks = change(RECIPES["edge_sam"], ["distill.validations=3", "initialize.start=teacher"])
    assert [step.validation.validations for step in (embedding, masks)] == [3, 3] and first.start == "teacher"
    assert not embedding.losses.padding and masks.losses == RECIPES["edge_sam"][-1].losses
    with pytest.raises(InputError, match="start 'here' is none of random, teacher"):
        change(RECIPES["edge_sam"], ["initialize.start=here"])


def test_choices_are_set_by_name_in_every_step_that_has_them():
    given = ["prune.round_to=8", "prune.criterion=fisher", "quirks.zeroed_rel_pos=True", "distill.lr=2e-3"]
    first, one, second, two = change(RECIPES["taylor"], given)
    for cut in (first, second):
        assert (cut.round_to, cut.criterion, cut.quirks.zeroed_rel_pos, cut.min_keep) == (8, "fisher", True, 0.25)
    assert one.optimizer == Optimizer(lr=2e-3, patience=3) and two.optimizer == Optimizer(lr=2e-3)
    assert change(RECIPES["slimsam"], []) == RECIPES["slimsam"]
    assert change(RECIPES["taylor"], ["distill.lr=auto"])[1].optimizer.lr == "auto"
    count = lambda *kinds: sum(name.startswith(kinds) for name in FIELDS)
    special = count("quantize."), count("masks.", "pretrain.")  # of steps that few recipes have
    assert len(FIELDS) - sum(special) <= 40 and special[0] <= 12 and special[1] <= 18


def test_choices_change_a_list_of_steps_too(material, tmp_path, monkeypatch):
    """By the record of options as by `compress`."""
    seen = []
    record = lambda options, teacher, recipe, student: seen.append(recipe)
    monkeypatch.setattr("slimsam_jax.compression.dispatch.run", record)
    monkeypatch.setattr("slimsam_jax.checkpoint.load", lambda path: None)
    monkeypatch.setattr("slimsam_jax.api.load", lambda path: None)
    options = compress_options(material, tmp_path / "slim", set=("prune.round_to=8",))
    compress_with(options, [Prune("bottleneck")])
    how = {"images": material / "images", "out": tmp_path / "slim"}
    api.compress(**how, recipe=[Prune("bottleneck")], set=["prune.round_to=8"])
    assert seen == [(Prune("bottleneck", round_to=8),)] * 2


def test_losses_and_prompts_of_trainings_by_masks_are_set_by_name():
    given = ["masks.prompts=16", "masks.embedding=0.5", "masks.click=missed", "distill.lr=3e-4"]
    _, embedding, masks = change(RECIPES["edge_sam"], given)
    assert (masks.prompting.prompts, masks.prompting.click, masks.losses.embedding) == (16, "missed", 0.5)
    assert masks.losses.bce == 5 and masks.optimizer.lr == embedding.optimizer.lr == 3e-4
    assert embedding.losses == RECIPES["edge_sam"][1].losses
    _, pretrain, masks = change(RECIPES["efficient_sam"], ["pretrain.masked=0.5", "pretrain.width=64"])
    assert (pretrain.masked, pretrain.width) == (0.5, 64) and masks == RECIPES["efficient_sam"][2]
    assert not {"masks.lr", "masks.train", "pretrain.epochs", "distill.bce", "masks.order"} & set(FIELDS)
    for setting, message in (
        ("masks.rounds=0", "rounds 0"),
        ("masks.click=best", "none of"),
        ("masks.hard=x", "no bool"),
    ):
        with pytest.raises(InputError, match=message):
            change(RECIPES["tiny_sam"], [setting])
    with pytest.raises(InputError, match=r"--set masks\.\.\.: the recipe has no such step"):
        change(RECIPES["mobile_sam"], ["masks.prompts=16"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prune.roundto=8", "nearest are prune.round_to"),
        ("prune.round_to", "say what it shall be, prune.round_to=VALUE"),
        ("prune.round_to=eight", "is no int"),
        ("prune.round_to=0", "at least 1"),
        ("prune.criterion=best", "none of projection, taylor"),
        ("quirks.zeroed_rel_pos=maybe", "is no bool"),
        ("prune.min_keep=1", "must be a number from 0 to 1"),
        ("distill.lr=nan", "lr nan"),
        ("distill.lr=fast", "is no float"),
        ("distill.features=1.5", "features 1.5 must be a number from 0 to 1"),
        ("prune.head_channels=whole", "scores of whole channels"),
        ("prune.criterion=taylor", "nothing to align with: set distill.align=none"),
        ("distill.train=mask_decoder", "no such choice"),
        ("quantize.weights=4", "--set quantize...: the recipe has no such step"),
        ("initialize.start=teacher", "--set initialize...: the recipe has no such step"),
        ("multiple=8", "multiple=8: it is called prune.round_to=8 since 0.3"),
        ("prune.multiple=8", "prune.multiple=8: it is called prune.round_to=8 since 0.3"),
        ("distill.passes=2", "it is distill.epochs since 0.3"),
        ("slice_rel_pos=false", "it is called quirks.zeroed_rel_pos=true since 0.3"),
        ("slice_rel_pos=x", "it is called quirks.zeroed_rel_pos since 0.3"),
        ("alternate=true", "since 0.3 a recipe is a list of steps"),
        ("quantize.fine_weights=4", "fine_weights=4: it is gone: give quantize.share=0.3"),
    ],
)
def test_choices_that_are_none_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        change(RECIPES["default"], [setting])


@pytest.mark.parametrize(
    ("choices", "missing"),
    [
        ((), "float_weights=0"),
        (("float_weights=0", "head=false"), "head=true"),
    ],
)
def test_a_share_says_what_else_it_needs(choices, missing):
    """The recipe itself keeps layers as they are."""
    settings = ["quantize.share=0.3", *(f"quantize.{choice}" for choice in choices)]
    with pytest.raises(InputError, match=f"by itself: add quantize.{missing}$"):
        change(RECIPES["integers"], settings)
    assert change(RECIPES["integers"], [settings[0], "quantize.float_weights=0"])[-2].share == 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "add distill.masks=1"),
        ({"losses": Losses(masks=1.0)}, "add distill.validate_by=miou or keep_checkpoint=last"),
        ({"losses": Losses(masks=1.0), "validation": Validation(keep_checkpoint="last")}, "add distill.lr=1e-4"),
        ({"train": ("decoder",)}, "must name image_encoder, mask_decoder"),
    ],
)
def test_a_decoder_learns_by_its_masks(fields, message):
    with pytest.raises(InputError, match=message):
        Distill(**{"train": ("image_encoder", "mask_decoder"), **fields})


def test_some_images_are_drawn_by_seed():
    images = list(range(50))
    drawn = [some_of(images, 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted(set(drawn[0])) and len(drawn[0]) == 10
    assert some_of(images, None, 0) == some_of(images, 99, 0) == images


def test_weights_drawn_anew_keep_the_widths():
    sam = random_sam(tiny_config())
    run = SimpleNamespace(options=SimpleNamespace(seed=0), start=None)
    new = initialize(run, SimpleNamespace(step=Initialize()), sam, sam)
    shapes = lambda params: jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes(new.params) == shapes(sam.params)
    assert new.params["mask_decoder"] is sam.params["mask_decoder"]
    kernel = lambda sam: sam.params["image_encoder"]["blocks_0"]["attn"]["q"]["kernel"]
    assert not np.allclose(kernel(new), kernel(sam))


def batch_with_clicks(count: int) -> dict[str, np.ndarray]:
    batch = random_images(tiny_config())
    clicks = [random_clicks(size, count, np.random.default_rng(0)) for size in batch["size"]]
    return batch | {name: np.stack([each[name] for each in clicks]) for name in clicks[0]}


def features_of(losses: Losses):
    """Student's and target's, of a batch with clicks."""
    step = Distill("bottleneck", losses=losses)
    teacher, student = random_sam(tiny_config()), random_sam(tiny_config(embed_dim=23), seed=1)
    batch = batch_with_clicks(losses.points)
    trainer = make_trainer(student, teacher, teacher, step)
    encode = lambda config, encoder, batch: run_encoder(config, encoder, batch)
    student_features = jax.jit(functools.partial(_student_features, encode, student.config, step))
    target_features = jax.jit(functools.partial(_target_features, encode, teacher.config, teacher.config, step))
    found = student_features(student.params, trainer.frozen, batch)
    return teacher, batch, found, target_features(trainer.frozen, batch)


def test_directions_are_told_apart_by_their_cosine():
    _, _, found, wanted = features_of(Losses(direction=1.0))
    one, other = found["embedding"], wanted["embedding"]
    cosine = (one * other).sum(-1) / jnp.linalg.norm(one, axis=-1) / jnp.linalg.norm(other, axis=-1)
    expected = 2 * (1 - cosine).mean() / one.shape[-1]
    np.testing.assert_allclose(mse(found["direction"], wanted["direction"]), expected, rtol=1e-5)


@pytest.mark.slow
def test_masks_are_those_of_the_decoder_for_each_click():
    teacher, batch, found, wanted = features_of(Losses(masks=1.0, points=3))
    assert found["masks"].shape == wanted["masks"].shape == (2 * 3, 4, 16, 12)
    for image in range(2):
        logits, iou = decode(
            teacher.config, teacher.params, wanted["embedding"][image], batch["points"][image], batch["labels"][image]
        )
        rows = slice(3 * image, 3 * image + 3)
        np.testing.assert_allclose(wanted["masks"][rows], jax.nn.sigmoid(logits), atol=1e-5)
        np.testing.assert_allclose(wanted["iou"][rows], iou, atol=1e-5)


def test_clicks_lie_on_the_image():
    clicks = random_clicks(np.array([40, 7]), 500, np.random.default_rng(0))
    xy = clicks["points"][clicks["labels"] == 1]
    assert len(xy) == 500 and (xy >= 0).all() and (xy < [7.5, 40.5]).all() and (xy.max(0) > [6, 36]).all()


@pytest.mark.slow
def test_the_decoder_learns_in_the_end():
    *_, first, last = lists.decoder(0.5)
    assert (first.train, last.train) == (("image_encoder",), ("image_encoder", "mask_decoder"))
    teacher, batch = random_sam(tiny_config()), batch_with_clicks(last.losses.points)
    student = random_sam(tiny_config(embed_dim=23), seed=1)
    trainer = make_trainer(student, student, teacher, last)
    terms = terms_of(last, 0, 10)
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
    step = Distill("bottleneck")
    trainer, terms = make_trainer(student, previous, teacher, step), terms_of(step, 0, 10)
    _, found = trainer.step(trainer.state, trainer.frozen, random_images(teacher.config), terms, 1e-3)
    assert np.isfinite(found["loss"]) and found["mlp"] > 0
