"""Integers in a training: what learns, and what gradients pass through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.quantization import Quantized, dequantize, ranges, running, training

RANDOM = np.random.default_rng(0)


def tree():
    """Two layers, the second of which quantises its input and multiplies integers; and a norm."""
    codes = lambda *shape: RANDOM.integers(-127, 128, shape).astype(np.int8)
    scales = lambda *shape: RANDOM.uniform(0.01, 0.02, shape).astype(np.float32)
    span = ranges.static(ranges.Range(-3.0, 5.0))
    return {
        "first": {"kernel": Quantized(codes(8, 6), scales(2, 6)), "bias": np.zeros(6, np.float32)},
        "second": {"kernel": Quantized(codes(6, 4), scales(1, 4), span, integer=True)},
        "norm": {"scale": np.ones(6, np.float32)},
    }


def function(params, x):
    x = (x @ params["first"]["kernel"] + params["first"]["bias"]) * params["norm"]["scale"]
    return jnp.tanh(x) @ params["second"]["kernel"]


def test_joined_is_the_inverse_and_scales_move_by_factors():
    whole = tree()
    nodes, trained = training.nodes_of(whole), training.learnable(whole)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(trained))
    back = training.joined(trained, nodes)
    assert jax.tree.structure(back) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, back, whole)
    trained["second"]["kernel"] = {"scale": np.log(np.full((1, 4), 2, np.float32)), "range": np.log(np.float32(3))}
    moved, before = training.joined(trained, nodes)["second"]["kernel"], whole["second"]["kernel"]
    np.testing.assert_allclose(moved.scale, 2 * before.scale, rtol=1e-6)
    np.testing.assert_allclose(moved.range, before.range * [3, 1], rtol=1e-6)  # its zero is a whole number
    np.testing.assert_array_equal(moved.codes, before.codes)


def test_one_input_has_one_range():
    """q, k and v read the same: however their factors move, it is quantised once."""
    node = lambda: Quantized(np.ones((4, 4), np.int8), np.ones((1, 4), np.float32), np.array([0.5, 3], np.float32))
    whole = {"attn": {name: {"kernel": node()} for name in ("q", "k", "v", "proj")}}
    trained = training.learnable(whole)
    for factor, name in enumerate(("q", "k", "v", "proj")):
        trained["attn"][name]["kernel"]["range"] = np.float32(factor)
    moved = training.joined(trained, training.nodes_of(whole))["attn"]
    steps = [float(moved[name]["kernel"].range[0]) for name in ("q", "k", "v", "proj")]
    np.testing.assert_allclose(steps, 0.5 * np.exp([1, 1, 1, 3]), rtol=1e-6)


def test_gradients_pass_through_what_is_rounded():
    """As if no input had been rounded, up to the rounding itself; and to the range, which has none of its own."""
    whole = tree()
    nodes = {path: training.in_floats(node) for path, node in training.nodes_of(whole).items()}
    trained, x = training.learnable(whole), RANDOM.normal(size=(32, 8)).astype(np.float32) / 10
    target = RANDOM.normal(size=(32, 4)).astype(np.float32)

    def loss(trained, run):
        return jnp.square(run(function, training.joined(trained, nodes), x) - target).mean()

    plain = lambda function, tree, x: function(dequantize(tree), x)
    found, expected = (jax.jit(jax.grad(loss), static_argnums=1)(trained, run) for run in (running.run, plain))
    assert float(abs(found["second"]["kernel"].pop("range"))) > 0 == float(expected["second"]["kernel"].pop("range"))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max())
    jax.tree.map(close, found, expected)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(found))


def test_whole_numbers_are_those_of_round():
    x = np.array([-2.5, -0.5, 0.49999997, 1.5, 8388609.0], np.float32)
    np.testing.assert_array_equal(ranges.whole(x), np.round(x))
    np.testing.assert_array_equal(jax.grad(lambda x: ranges.whole(x).sum())(x), 1)
