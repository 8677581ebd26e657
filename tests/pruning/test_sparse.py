"""Sparse training: updates by hand, and norms that shrink."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import find_groups, sparse

RANDOM = np.random.default_rng(0)
PARAMS = {
    "in": {"kernel": RANDOM.normal(size=(3, 8)).astype(np.float32), "bias": np.ones(8, np.float32)},
    "out": RANDOM.normal(size=(8, 5)).astype(np.float32),
    "scale": np.ones(3, np.float32),
}
X = RANDOM.normal(size=(6, 3)).astype(np.float32)
NAME = "in/kernel:1"
KEEP = {NAME: np.array([0, 2, 5, 7])}
GONE = [1, 3, 4, 6]


def function(params, x):
    hidden = jax.nn.relu((x * params["scale"]) @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]


@pytest.fixture(scope="module")
def grouping():
    grouping = find_groups(function, PARAMS, X)
    assert grouping.widths == {NAME: 8}
    return grouping


def norms(params):
    squares = np.square(params["in"]["kernel"]).sum(0) + np.square(params["out"]).sum(1)
    return np.sqrt(squares)


def updated(transformation, times=1):
    """The updates after so many, of gradients that are all 1."""
    state = transformation.init(PARAMS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(times):
        updates, state = jax.jit(transformation.update)(ones, state, PARAMS)
    return updates


def by_hand(factors):
    added = {"kernel": 1 + factors * PARAMS["in"]["kernel"], "bias": np.ones(8)}
    return {"in": added, "out": 1 + factors[:, None] * PARAMS["out"], "scale": np.ones(3)}


def assert_equal(updates, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), updates, expected)


def test_group_lasso_in_closed_form(grouping):
    """The slope of strength * norm; biases and what is in no group are left alone."""
    assert_equal(updated(sparse.group_lasso(grouping, 0.3)), by_hand(0.3 / norms(PARAMS)))
    penalty = lambda p: 0.3 * jnp.sqrt((p["in"]["kernel"] ** 2).sum(0) + (p["out"] ** 2).sum(1)).sum()
    slopes = jax.grad(penalty)(PARAMS)
    assert_equal(updated(sparse.group_lasso(grouping, 0.3)), jax.tree.map(lambda g: 1 + g, slopes))


def test_scales_alone_are_pulled_by_their_sign(grouping):
    """Network slimming: of an array with one number per channel the norm is its size."""
    updates = updated(sparse.group_lasso(grouping, 0.3, votes="in/bias"))
    assert_equal(updates, {**by_hand(np.zeros(8)), "in": {"kernel": np.ones((3, 8)), "bias": np.full(8, 1.3)}})


def test_a_dead_channel_has_no_slope(grouping):
    dead = pruning.mask(PARAMS, grouping, KEEP)
    lasso = sparse.group_lasso(grouping, 0.3)
    updates, _ = lasso.update(jax.tree.map(jnp.zeros_like, PARAMS), lasso.init(dead), dead)
    assert np.isfinite(updates["out"]).all() and not updates["out"][1].any() and updates["out"][0].any()


@pytest.mark.parametrize(("times", "strength"), [(1, 0.0), (2, 0.1), (5, 0.2), (9, 0.25)])
def test_what_goes_is_decayed_more_and_more(grouping, times, strength):
    """By 0.1 every second update, up to 0.25."""
    growing = sparse.growing_regularization(grouping, 0.1, every=2, most=0.25, keep=KEEP)
    factors = np.zeros(8)
    factors[GONE] = strength
    assert_equal(updated(growing, times), by_hand(factors))


def test_without_a_choice_the_smallest_are_decayed_most(grouping):
    squares = np.square(norms(PARAMS))
    smallness = (squares.max() - squares) / (squares.max() - squares.min())
    assert_equal(updated(sparse.growing_regularization(grouping, 0.1), 3), by_hand(0.3 * smallness))


@pytest.mark.parametrize("kind", ["lasso", "growing"])
def test_training_shrinks_the_channels(grouping, kind):
    """Of a task that needs all channels: lasso shrinks all, growing regularisation those that are to go, and more."""
    lasso = sparse.group_lasso(grouping, 0.02)
    growing = sparse.growing_regularization(grouping, 0.01, keep=KEEP)
    target = function(PARAMS, X)
    loss = lambda params: jnp.mean((function(params, X) - target) ** 2)
    optimizer = optax.chain({"lasso": lasso, "growing": growing}[kind], optax.sgd(0.03))

    @jax.jit
    def train(params):
        def turn(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(turn, (params, optimizer.init(params)), None, length=150)
        return params

    shrunk = norms(train(jax.tree.map(jnp.asarray, PARAMS))) / norms(PARAMS)
    if kind == "lasso":
        assert (shrunk < 0.99).all()
    else:
        stay = KEEP[NAME]
        assert (shrunk[GONE] < 0.3).all() and shrunk[GONE].max() < 0.5 * shrunk[stay].min()


def test_groups_with_products_and_several_axes():
    """Fused q, k, v of heads: the norm of a channel is over all heads; weights in two groups are penalised twice."""
    shapes = {"qkv": (4, 3 * 2 * 3), "out": (2 * 3, 4)}
    params = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def attend(params, x):
        q, k, v = jnp.moveaxis((x @ params["qkv"]).reshape(6, 3, 2, 3), 1, 0)
        weights = jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", q, k))
        return jnp.einsum("hnm,mhd->nhd", weights, v).reshape(6, 6) @ params["out"]

    grouping = find_groups(attend, params, RANDOM.normal(size=(6, 4)).astype(np.float32))
    assert sorted(grouping.widths.values()) == [2, 3]
    qkv, out = params["qkv"].reshape(4, 3, 2, 3), params["out"].reshape(2, 3, 4)
    heads = np.sqrt((qkv**2).sum((0, 1, 3)) + (out**2).sum((1, 2)))
    channels = np.sqrt((qkv**2).sum((0, 1, 2)) + (out**2).sum((0, 2)))
    factor = 0.5 / heads[:, None] + 0.5 / channels
    lasso = sparse.group_lasso(grouping, 0.5)
    updates, _ = lasso.update(jax.tree.map(jnp.zeros_like, params), lasso.init(params), params)
    np.testing.assert_allclose(updates["qkv"], (qkv * factor).reshape(4, 18), rtol=1e-5)
    np.testing.assert_allclose(updates["out"], (out * factor[..., None]).reshape(6, 4), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: sparse.group_lasso(g, -1.0), r"strength -1\.0 of a penalty is negative"),
        (lambda g: sparse.group_lasso(g, 1.0, only=["b"]), "there is no group 'b' to penalise"),
        (lambda g: sparse.group_lasso(g, 1.0, votes="*/scale"), r"votes='\*/scale' matches nothing"),
        (lambda g: sparse.growing_regularization(g, -0.1), r"grow -0\.1 and most 1\.0 must not be negative"),
        (lambda g: sparse.growing_regularization(g, 0.1, every=0), "every 0 at least 1"),
        (lambda g: sparse.growing_regularization(g, 0.1, keep={NAME: [9]}), "between 0 and 7"),
        (lambda g: sparse.group_lasso(g, 1.0).update(PARAMS, optax.EmptyState()), "needs them: call update"),
    ],
)
def test_what_cannot_be_penalised(grouping, call, message):
    with pytest.raises(InputError, match=message):
        call(grouping)
