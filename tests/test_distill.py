"""Losses by hand, and a training step that learns, on one device and on eight."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax import distill
from slimsam_jax.recipes import RECIPES, STAGES


def test_mse_by_hand():
    student = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array([[3.0, 4.0]])]}
    target = {"a": jnp.array([1.0, 4.0]), "b": [jnp.array([[3.0, 0.0]])]}
    np.testing.assert_allclose(distill.mse(student, target), (4 + 16) / 4)
    variance = np.var([1.0, 4.0, 3.0, 0.0])
    np.testing.assert_allclose(distill.mse(student, target, relative=True), 5 / variance)
    assert distill.mse([], []) == 0


def test_more_elements_than_an_int32_holds():
    """ViT-H at 1024 px, four images: features of 2**31 elements."""
    leaf = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    assert jax.eval_shape(lambda a, b: distill.mse(a, b, relative=True), leaf, leaf).shape == ()


def test_terms_are_weighted_and_must_match():
    one, two = jnp.array([1.0]), jnp.array([3.0])
    loss, terms = distill.distillation_loss({"x": one, "y": one}, {"x": two, "y": one}, {"x": 0.5, "y": 9.0})
    assert loss == 2.0 and terms == {"x": 4.0, "y": 0.0}
    with pytest.raises(ValueError, match="differ"):
        distill.distillation_loss({"x": one}, {"x": two, "y": one}, {"x": 1.0})


def test_schedules_of_the_paper():
    recipe = RECIPES["default"]
    first, last = (STAGES[0].weights(progress, recipe) for progress in (0.49, 0.5))
    assert first == {"embedding": 0.5, "qkv_window": 0.5, "qkv_global": 0.5, "mlp": 0.5}
    assert last == {"embedding": 1.0, "qkv_window": 0, "qkv_global": 0, "mlp": 0}
    assert STAGES[0].weights(0.0, RECIPES["slimsam"])["qkv_global"] == 0
    weights = STAGES[1].weights(0.0, recipe)
    np.testing.assert_allclose(
        [weights["embedding"], weights["stream"], weights["previous"]], [1 / 11, 10 / 11, 10 / 11]
    )
    assert STAGES[1].weights(0.56, recipe)["stream"] == 0


def linear_problem(steps=200):
    """A student matrix that shall become the teacher's."""
    random = np.random.default_rng(0)
    teacher = {"w": jnp.asarray(random.standard_normal((4, 3)), jnp.float32)}
    student = {"w": jnp.zeros((4, 3))}
    forward = lambda params, batch: {"out": batch["x"] @ params["w"]}
    optimizer = distill.make_optimizer(0.1, steps)
    step = distill.make_step(forward, forward, lambda step: {"out": 1.0}, optimizer)
    batches = [{"x": random.standard_normal((8, 4)).astype(np.float32)} for _ in range(steps)]
    return step, distill.init_state(student, optimizer), teacher, batches


def test_a_student_learns():
    step, state, teacher, batches = linear_problem()
    for batch in batches:
        state, terms = step(state, teacher, batch)
    assert terms["loss"] < 1e-4 and int(state.step) == 200
    np.testing.assert_allclose(state.params["w"], teacher["w"], atol=0.02)


def test_the_step_compiles_once():
    chex.clear_trace_counter()
    forward = chex.assert_max_traces(lambda params, batch: {"out": batch @ params}, n=2)  # student and teacher
    optimizer = distill.make_optimizer(0.1, 10)
    step = distill.make_step(forward, forward, lambda step: {"out": 1.0}, optimizer)
    state = distill.init_state(jnp.zeros((4, 3)), optimizer)
    for _ in range(5):
        state, _ = step(state, jnp.ones((4, 3)), np.ones((2, 4), np.float32))


def test_sharded_step_equals_one_device(tmp_path):
    """In a process of its own, since the number of CPU devices is fixed when JAX starts."""
    import subprocess
    import sys
    from pathlib import Path

    program = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from slimsam_jax import distill
from test_distill import linear_problem
step, state, teacher, batches = linear_problem(20)
mesh = distill.data_mesh()
assert mesh.size == 8
state, teacher = distill.replicate(state, mesh), distill.replicate(teacher, mesh)
for batch in batches:
    state, _ = step(state, teacher, distill.shard_batch(batch, mesh))
assert "all-reduce" in step.lower(state, teacher, distill.shard_batch(batches[0], mesh)).compile().as_text()
np.save("sharded.npy", state.params["w"])
"""
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    step, state, teacher, batches = linear_problem(20)
    for batch in batches:
        state, _ = step(state, teacher, batch)
    np.testing.assert_allclose(np.load(tmp_path / "sharded.npy"), state.params["w"], atol=1e-5)


def test_optimizer_schedules():
    for schedule in ("cosine", "constant"):
        optimizer = distill.make_optimizer(1e-3, 1, schedule)  # a single step must do
        params = jnp.ones(2)
        updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
        np.testing.assert_allclose(updates, -1e-3, rtol=1e-3)
    assert jax.tree.leaves(distill.init_state({"w": jnp.ones(2)}, optimizer).params)[0].shape == (2,)
