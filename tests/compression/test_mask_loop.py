"""Prompts in the loop: where clicks come, against EdgeSAM's own, and what a step learns by."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import SQUARE, random_images
from helpers.shared import shared
from slimsam_jax.compression import mask_loop
from slimsam_jax.compression.mask_loop import Decoded, Scene, Side, chosen, clicked, compared, prompted_loss, taught
from slimsam_jax.compression.mask_steps import DistillMasks, MaskLosses, Prompting
from slimsam_jax.compression.prepare import check_prompts
from slimsam_jax.distillation.losses import absolute_error
from slimsam_jax.distillation.mask_losses import hardness, overlap
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.prompts import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NOT_A_POINT
from slimsam_jax.models import efficient_sam_head
from slimsam_jax.training.prompt_loop import FEWEST, disagreement, drawn, valid_share


@pytest.fixture(scope="module")
def golden():
    with np.load(shared("golden/edge_sam.npz"), allow_pickle=False) as arrays:
        return {name.removeprefix("loop/"): arrays[name] for name in arrays.files if name.startswith("loop/")}


def test_cells_are_valid_as_in_edge_sam(golden):
    valid = valid_share(golden["sizes_before_pad"], (32, 32), 4)
    np.testing.assert_array_equal(valid, golden["valid_low_res"][:, 0])


def test_the_embedding_s_cells_are_valid_as_in_edge_sam():
    with np.load(shared("golden/edge_sam.npz"), allow_pickle=False) as arrays:
        sizes, wanted = arrays["pixel_loss/sizes_before_pad"], arrays["pixel_loss/valid"]
    np.testing.assert_array_equal(valid_share(sizes, (8, 8), 16) > 0.5, wanted[:, 0])


def test_clicks_come_where_edge_sam_draws_them(golden):
    """A cell that is image in part can be too much, and not missed: the arrays have both."""
    learns = jnp.ones((8, 4))
    index = chosen(golden["teacher_iou"], learns)
    np.testing.assert_array_equal(index, golden["selected"])
    student, teacher = (mask_loop._take(golden[f"{side}_logits"], index) > 0 for side in ("student", "teacher"))
    for mask, name in ((student, "student_mask"), (teacher, "teacher_mask")):  # there with the share that is image
        np.testing.assert_array_equal(mask * golden["valid_low_res"][:, 0], golden[name][:, 0])
    found = disagreement(student, teacher, golden["valid_low_res"][:, 0])
    np.testing.assert_array_equal(found, golden["label_map"])
    np.testing.assert_array_equal((found != ABSENT).sum((1, 2)), golden["candidates"])
    _, labels = jax.vmap(functools.partial(drawn, jax.random.key(0), fewest=FEWEST))(found)
    np.testing.assert_array_equal(labels == ABSENT, golden["aborted"])


def test_a_click_of_edge_sam_has_our_label_and_lies_half_a_cell_before_ours(golden):
    """Theirs is at the corner of its cell, ours in the middle."""
    learns = ~golden["aborted"]
    cells, labels = golden["example_point_low_res"][learns, 0], golden["example_label"][learns, 0]
    x, y = cells.astype(int).T
    np.testing.assert_array_equal(golden["label_map"][learns, y, x], labels)
    image = jnp.asarray(golden["label_map"][learns])
    for i, (column, row) in enumerate(zip(x, y, strict=True)):
        alone = jnp.where((jnp.arange(32)[:, None] == row) & (jnp.arange(32) == column), image[i], ABSENT)
        cell, label = drawn(jax.random.key(i), alone)
        assert label == labels[i]
        ours = (np.asarray(cell) + 0.5) * 4  # as `mask_loop.clicked` places it, for patches of 16 pixels
        np.testing.assert_array_equal(ours - 2, golden["example_point_model_frame"][learns][i, 0])


@pytest.mark.parametrize("click", ["disagreement", "missed"])
def test_each_next_click_lies_where_the_student_and_the_truth_disagree(click):
    """Over many draws: everywhere there, nowhere else, with the label of the truth, in its own place of the prompt."""
    random = np.random.default_rng(0)
    mask, truth = random.random((2, 1, 16, 16)) < 0.3
    scene = Scene(None, truth, jnp.ones((1, 16, 16)), jnp.zeros(1, bool))
    step = DistillMasks(prompting=Prompting(rounds=3, click=click))
    start = jnp.zeros((1, 4, 2)), jnp.array([[1, NOT_A_POINT, ABSENT, ABSENT]])
    put = jax.jit(lambda keys: clicked(step, SQUARE, scene._replace(keys=keys), start, 1, mask, truth))
    seen = set()
    for seed in range(400):
        points, labels = put(jax.random.split(jax.random.key(seed), 1))
        x, y = (np.asarray(points[0, 3]) / 4 - 0.5).astype(int)
        assert labels[0, 3] == truth[0, y, x] != mask[0, y, x] and labels[0, 2] == ABSENT
        seen.add((y, x))
    wrong = (truth & ~mask) if click == "missed" else truth != mask
    assert seen <= {*zip(*np.nonzero(wrong[0]), strict=True)} and len(seen) > 0.9 * wrong.sum()


def test_for_a_box_the_single_mask_learns_for_a_click_all():
    learns = taught(jnp.array([True, False]), 4)
    np.testing.assert_array_equal(learns, [[1, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(chosen(jnp.array([[0.1, 0.9, 0, 0]] * 2), learns), [0, 1])


def decoded(seed: int) -> Decoded:
    random = np.random.default_rng(seed)
    return Decoded(*(random.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 8, 8), (2, 4), (2, 5, 6))))


def test_terms_of_a_round():
    """Those that are asked for; at the teacher's own outputs what compares them is nothing."""
    masks = (np.random.default_rng(3).random((2, 8, 8)) < 0.5).astype(np.float32)
    scene = Scene(None, masks, jnp.ones((2, 8, 8)), jnp.array([True, False]))
    of = lambda ours, theirs, target="teacher", **w: compared(
        DistillMasks(MaskLosses(**{"bce": 0.0, "dice": 0.0, **w}), Prompting(target=target)),
        SQUARE, scene, None, ours, theirs,
    )[0]  # fmt: skip
    ours, theirs = decoded(0), decoded(1)
    for target in ("teacher", "annotation"):
        assert set(of(ours, theirs, target, tokens=1.0)) == {"tokens", "overlap"}
        assert set(of(ours, theirs, target, focal=1.0, iou=1.0)) == {"focal", "iou", "overlap"}
    same = of(theirs, theirs, tokens=1.0, outputs=1.0, hard=True)
    assert same["tokens"] == same["outputs"] == 0 and same["overlap"] == 1
    plain, hard = (of(ours, theirs, outputs=1.0, hard=hard)["outputs"] for hard in (False, True))
    assert 0 < hard < plain  # each weight is below 1
    weight = hardness(*(overlap(side.logits, masks[:, None]) for side in (ours, theirs)))[..., None, None]
    np.testing.assert_allclose(hard, absolute_error(ours.logits, theirs.logits, weight), rtol=1e-6)
    # The teacher's masks are the targets of one, the annotations of the other.
    assert of(ours, theirs, dice=1.0)["dice"] != of(ours, theirs, "annotation", dice=1.0)["dice"]


def test_padding_counts_in_no_term():
    """What student and teacher make of what lies beside the image is anything."""
    random = np.random.default_rng(4)
    valid = np.ones((2, 8, 8), np.float32)
    valid[:, 5:] = 0
    beside = lambda logits: np.where(valid[:, None] > 0, logits, 100 * random.standard_normal(logits.shape))
    ours, theirs, masks = decoded(0), decoded(1), np.float32(random.random((2, 8, 8)) < 0.5) * valid
    other = [side._replace(logits=np.float32(beside(side.logits))) for side in (ours, theirs)]
    losses = {"bce": 1.0, "dice": 1.0, "focal": 1.0, "iou": 1.0, "tokens": 1.0, "outputs": 1.0, "hard": True}
    scene = Scene(None, masks, jnp.asarray(valid), jnp.array([True, False]))
    for target in ("teacher", "annotation"):
        step = DistillMasks(MaskLosses(**losses), Prompting(target=target))
        before, after = (compared(step, SQUARE, scene, None, *sides)[0] for sides in ((ours, theirs), other))
        for name, wanted in before.items():
            np.testing.assert_allclose(after[name], wanted, rtol=1e-5, err_msg=f"{target} {name}")


def a_batch(config, prompts: int = 2) -> dict[str, np.ndarray]:
    batch, random = random_images(config), np.random.default_rng(0)
    side = 4 * config.grid[0]
    points = random.uniform(0, 59, (2, prompts, 2, 2)).astype(np.float32)
    labels = np.tile([[1, NOT_A_POINT], [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]], (2, 1, 1)).astype(np.int32)
    masks = (random.random((2, prompts, side, side)) < 0.5).astype(np.float32)
    return {**batch, "points": points, "labels": labels, "masks": masks, "seed": np.array([5, 6], np.uint32)}


def stand_in(config, params, embedding, points, labels):
    """A decoder that compiles at once: its outputs depend on all that there is of the prompts."""
    there = (labels != ABSENT)[..., None] * points
    mixed = params * embedding + there.sum((1, 2))[:, None, None, None] / 100
    logits = jnp.repeat(jnp.repeat(mixed[..., :4], 4, 1), 4, 2).transpose(0, 3, 1, 2)
    return logits, jax.nn.sigmoid(logits.mean((2, 3))), mixed[:, 0]


def test_a_number_of_rounds_that_varies_compiles_once_and_counts_them_alone(monkeypatch):
    """Rounds that are not due change neither loss nor gradient: the same as with as many from the start."""
    monkeypatch.setattr(mask_loop, "decode_tokens", stand_in)
    batch = a_batch(SQUARE)
    embedding = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 4, 32)), jnp.float32)
    traced = []
    whole = mask_loop.compared
    monkeypatch.setattr(mask_loop, "compared", lambda *args: traced.append(1) or whole(*args))

    def program(rounds: int, vary: bool):
        step = DistillMasks(MaskLosses(tokens=1.0), Prompting(rounds=rounds, vary=vary, target="teacher"))
        weights = step.losses.weights()
        sides = lambda embedding: (Side(SQUARE, 1.0, embedding), Side(SQUARE, -0.5, embedding))
        loss = lambda embedding, batch: prompted_loss(step, *sides(embedding), batch, weights)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    varying, fixed = program(2, True), program(1, False)
    seeds = [np.array([seed, 6], np.uint32) for seed in (4, 5)]  # one round, and two
    (one, _), slope = varying(embedding, {**batch, "seed": seeds[0]})
    count = len(traced)
    (two, _), _ = varying(embedding, {**batch, "seed": seeds[1]})
    assert len(traced) == count and abs(one - two) > 1e-4
    (wanted, _), other = fixed(embedding, {**batch, "seed": seeds[0]})
    np.testing.assert_allclose(one, wanted, rtol=1e-5)
    np.testing.assert_allclose(slope, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("vary", [True, False])
def test_the_backward_pass_decodes_again_for_the_student_alone(monkeypatch, vary):
    """Of many rounds the student's activations are computed twice, the teacher's masks once."""

    def marked(config, params, embedding, *prompts):
        function = {"ours": jnp.sinh, "theirs": jnp.tan}[config.name]
        return stand_in(config, params, function(embedding), *prompts)

    named = lambda name: type("Named", (), {"name": name, "__getattr__": lambda _, field: getattr(SQUARE, field)})()
    monkeypatch.setattr(mask_loop, "decode_tokens", marked)
    step = DistillMasks(MaskLosses(tokens=1.0), Prompting(rounds=3, vary=vary, target="annotation"))
    batch, weights = a_batch(SQUARE), step.losses.weights()

    def loss(embedding):
        return prompted_loss(
            step, Side(named("ours"), 1.0, embedding), Side(named("theirs"), -0.5, embedding), batch, weights
        )[0]

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 4, 4, 32))))
    assert [program.count(f" {name} ") for name in ("sinh", "tan")] == [2, 1]


def test_choices_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"add distill\.validate_by=miou"):
        DistillMasks(validation=dataclasses.replace(DistillMasks().validation, validate_by="error"))
    with pytest.raises(InputError, match="a loss without terms"):
        DistillMasks(MaskLosses(bce=0.0, dice=0.0))
    head = efficient_sam_head.HeadConfig((64, 64))
    with pytest.raises(InputError, match=r"no background points .*masks.click=missed"):
        check_prompts(DistillMasks(), head)
    check_prompts(DistillMasks(prompting=Prompting(rounds=5, click="missed")), head)
    with pytest.raises(InputError, match=r"takes 6 points at most, .*masks.rounds=2 fewer"):
        check_prompts(DistillMasks(prompting=Prompting(rounds=6, click="missed")), head)
