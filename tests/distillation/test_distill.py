"""Losses by hand, and a training step that learns."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slimsam_jax.compression.loss_terms import ALIGN, SAM, terms
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.steps import Distill
from slimsam_jax.distillation.losses import distillation_loss, mse
from slimsam_jax.distillation.schedules import learning_rates, plateau_scale
from slimsam_jax.distillation.step import init_state, make_optimizer, make_step

ONE = {"out": 1.0}


def test_mse_by_hand():
    student = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array([[3.0, 4.0]])]}
    target = {"a": jnp.array([1.0, 4.0]), "b": [jnp.array([[3.0, 0.0]])]}
    np.testing.assert_allclose(mse(student, target), (4 + 16) / 4)
    variance = np.var([1.0, 4.0, 3.0, 0.0])
    np.testing.assert_allclose(mse(student, target, relative=True), 5 / variance)
    assert mse([], []) == 0


def test_more_elements_than_an_int32_holds():
    """ViT-H at 1024 px, four images: features of 2**31 elements."""
    leaf = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    assert jax.eval_shape(lambda a, b: mse(a, b, relative=True), leaf, leaf).shape == ()


def test_terms_are_weighted_and_must_match():
    one, two = jnp.array([1.0]), jnp.array([3.0])
    loss, terms = distillation_loss({"x": one, "y": one}, {"x": two, "y": one}, {"x": 0.5, "y": 9.0})
    assert loss == 2.0 and terms == {"x": 4.0, "y": 0.0}
    with pytest.raises(ValueError, match="differ"):
        distillation_loss({"x": one}, {"x": two, "y": one}, {"x": 1.0, "y": 1.0})
    _, terms = distillation_loss({"x": one, "y": one}, {"x": two, "y": two}, {"x": 1.0})
    assert set(terms) == {"x"}  # what has no weight is not computed


def test_schedules_of_the_paper():
    one, two = Distill("bottleneck"), Distill("stream+embedding")
    first, last = (terms(one, step, 100) for step in (49, 50))
    assert first == {"embedding": 0.5, "qkv_window": 0.5, "qkv_global": 0.5, "mlp": 0.5}
    assert last == {"embedding": 1.0}
    assert set(terms(RECIPES["slimsam"][1], 0, 100)) == {"embedding", "qkv_window", "mlp"}
    for steps in (20, 60, 700):  # a whole number of steps an epoch: the weight changes just where an epoch begins
        found = [terms(two, step, steps).get("stream", 0) for step in range(steps)]
        epochs = np.arange(steps) * 20 // steps
        np.testing.assert_allclose(found, np.where(epochs < 11, (10 - epochs) / 11, 0), atol=1e-12)
    weights = ALIGN[two.align](0.0, two, SAM)
    np.testing.assert_allclose(
        [weights["embedding"], weights["stream"], weights["previous"]], [1 / 11, 10 / 11, 10 / 11]
    )
    assert ALIGN[two.align](0.56, two, SAM)["stream"] == 0


def linear_problem(steps=200, **options):
    """A student matrix that shall become the teacher's."""
    random = np.random.default_rng(0)
    teacher = {"w": jnp.asarray(random.standard_normal((4, 3)), jnp.float32)}
    student = {"w": jnp.zeros((4, 3))}
    forward = lambda params, *batch: {"out": batch[-1]["x"] @ params["w"]}
    optimizer = make_optimizer()
    step = make_step(forward, forward, optimizer, **options)
    batches = [{"x": random.standard_normal((8, 4)).astype(np.float32)} for _ in range(steps)]
    return step, init_state(student, optimizer, options.get("ema", 0.0)), teacher, batches


def test_a_student_learns():
    step, state, teacher, batches = linear_problem()
    for batch, rate in zip(batches, learning_rates(0.1, 200), strict=True):
        state, terms = step(state, teacher, batch, ONE, rate)
    assert terms["loss"] < 1e-4 and int(state.step) == 200
    np.testing.assert_allclose(state.params["w"], teacher["w"], atol=0.02)


def test_the_step_compiles_once():
    chex.clear_trace_counter()
    forward = chex.assert_max_traces(lambda params, *batch: {"out": batch[-1] @ params}, n=2)  # student and teacher
    optimizer = make_optimizer()
    step = make_step(forward, forward, optimizer)
    state = init_state(jnp.zeros((4, 3)), optimizer)
    for rate in (0.1, 1e-4, 0.0):
        state, _ = step(state, jnp.ones((4, 3)), np.ones((2, 4), np.float32), {"out": 10 * rate}, rate)


def test_schedules():
    np.testing.assert_array_equal(learning_rates(0.3, 4, "constant"), [0.3] * 4)
    for schedule in ("cosine", "constant"):
        np.testing.assert_allclose(learning_rates(0.3, 1, schedule), [0.3])  # a single step must do
    with pytest.raises(ValueError, match="'cosinus'"):
        learning_rates(0.3, 4, "cosinus")
    rates = learning_rates(2.0, 100)
    np.testing.assert_allclose(rates[:6], [0.4, 0.72, 1.04, 1.36, 1.68, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[5:], 1 + np.cos(np.pi * np.arange(95) / 95), rtol=1e-4, atol=1e-6)


def test_a_step_is_as_long_as_the_learning_rate():
    forward = lambda params, _, batch: {"out": batch @ params}
    optimizer = make_optimizer()
    step = make_step(forward, lambda frozen, batch: {"out": batch @ frozen}, optimizer)
    for rate in (1e-3, 1e-1):  # Adam's first step
        state, _ = step(init_state(jnp.zeros(3), optimizer), jnp.ones(3), np.eye(3), ONE, rate)
        np.testing.assert_allclose(state.params, rate, rtol=1e-5)


def test_weight_decay_goes_with_the_learning_rate():
    optimizer = make_optimizer(weight_decay=0.5, decayed=lambda params: {"a": True, "b": False})
    nothing = lambda *_: {"out": jnp.zeros(1)}
    step = make_step(nothing, nothing, optimizer)
    state, _ = step(init_state({"a": jnp.ones(2), "b": jnp.ones(2)}, optimizer), None, np.ones(1), ONE, 0.1)
    chex.assert_trees_all_close(state.params, {"a": jnp.full(2, 0.95), "b": jnp.ones(2)})


def test_a_batch_in_parts_gives_the_same_step():
    for options in ({}, {"reduction": "sum"}):
        found = []
        for parts in (1, 2, 4):
            step, state, teacher, batches = linear_problem(5, parts=parts, **options)
            for batch, rate in zip(batches, learning_rates(0.1, 5), strict=True):
                state, terms = step(state, teacher, batch, ONE, rate)
            found.append((state, terms))
        for other in found[1:]:
            chex.assert_trees_all_close(other, found[0], rtol=1e-5)


def test_sum_takes_eight_images_gradients_together():
    """Seen by gradient descent, not by Adam, which divides it out again."""
    forward, optimizer = lambda params, _, batch: {"out": batch * params}, optax.sgd(1.0)
    batch, moved = np.arange(8, dtype=np.float32), {}
    for reduction in ("mean", "sum"):
        step = make_step(forward, lambda frozen, batch: {"out": 0 * batch}, optimizer, reduction=reduction)
        state, _ = step(init_state(jnp.ones(()), optimizer), None, batch, ONE, 1.0)
        moved[reduction] = 1 - float(state.params)
    np.testing.assert_allclose(moved["mean"], 2 * np.mean(batch**2))
    np.testing.assert_allclose(moved["sum"], 2 * np.sum(batch**2))


def test_moving_average():
    step, state, teacher, batches = linear_problem(20, ema=0.9)
    expected = np.zeros((4, 3))
    for batch in batches[:3]:
        state, _ = step(state, teacher, batch, ONE, 0.1)
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["w"])
        np.testing.assert_allclose(state.average["w"], expected, rtol=1e-5)


def test_clipping():
    optimizer = make_optimizer(clip=1.0)
    state = optimizer.init(jnp.zeros(2))
    for gradient in ([30.0, 40.0], [0.3, 0.4]):  # the first clipped to the direction's unit, the second left alone
        _, state = optimizer.update(jnp.array(gradient), state)
    first_moment = state[1][0].mu
    np.testing.assert_allclose(first_moment, 0.9 * 0.1 * np.array([0.6, 0.8]) + 0.1 * np.array([0.3, 0.4]), rtol=1e-5)


@pytest.mark.parametrize("patience", [0, 3])
def test_plateau_is_that_of_pytorch(patience):
    import torch

    random = np.random.default_rng(patience)
    scores = np.round(np.cumsum(random.standard_normal(60) * 0.01) + 0.4, 3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=patience, eps=0)
    for count, score in enumerate(scores, 1):
        theirs.step(score)
        np.testing.assert_allclose(plateau_scale(scores[:count], patience), optimizer.param_groups[0]["lr"])
    assert plateau_scale([-1.0, -1.1, -1.2], 1) == 0.5  # negative scores, getting worse
