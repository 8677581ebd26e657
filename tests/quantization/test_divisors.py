"""Inputs whose channels are divided before they are quantised, and weights multiplied."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax.errors import InputError
from slimsam_jax.quantization import capture, dequantize, quantize, ranges, saving
from slimsam_jax.quantization.running import run
from slimsam_jax.quantization.weights import divisors_of

CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
SHAPES = {"conv": (3, 3, 4, 6), "heads": (6, 2, 4), "out": (2, 4, 5), "depth": (3, 3, 1, 5), "plain": (6, 4)}
REACH = np.array([0.02, 1, 0.1, 30], np.float32)  # of the input's channels


def network(params, x):
    """A convolution that pads, heads beside a matrix that reads the same, a product whose parameter comes first, a
    convolution in groups. What bounds its values reaches no bound: as far above 0 as below, an end of a range lies
    between two codes, and the last bit decides for either.
    """
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", **CONV)
    x = jnp.sin(x) * REACH[[0, 1, 2, 3, 1, 2]]
    plain = jnp.einsum("bhwc,cd->bhwd", x, params["plain"])
    x = jnp.einsum("bhwc,cnd->bhwnd", x, params["heads"]) + plain[..., None, :]
    x = jnp.einsum("nde,bhwnd->bhwe", params["out"], jnp.sin(x) * REACH)
    return jax.lax.conv_general_dilated(x, params["depth"], (1, 1), "SAME", feature_group_count=5, **CONV)


@pytest.fixture(scope="module")
def case():
    """Parameters, an input, and {power: integers with ranges of all that is read}."""
    random = np.random.default_rng(3)
    params = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    # Channels that reach far are read by small weights, as in a network that has learned.
    params["conv"] /= REACH[:, None]
    params["heads"] /= REACH[[0, 1, 2, 3, 1, 2], None, None]
    params["plain"] /= REACH[[0, 1, 2, 3, 1, 2], None]
    params["out"] /= REACH[:, None]
    x = (random.standard_normal((2, 5, 4, 4)) * REACH).astype(np.float32)
    seen, found = capture(network, params, [(x,)]), {}
    for power in (0.0, 0.75):
        divisors = divisors_of(seen, power) if power else {}
        integers = quantize(params, seen, 8, divisors=divisors)
        for path, node in integers.items():
            span = seen[path].range if node.divisor is None else ranges.divided(seen[path].channels, node.divisor)
            integers[path] = dataclasses.replace(node, range=ranges.static(span))
        found[power] = integers
    return params, x, found


def test_channels_are_divided_by_what_they_reach(case):
    params, x, found = case
    nodes = found[0.75]
    assert {path: node.divisor.shape for path, node in nodes.items() if node.divisor is not None} == {
        "conv": (1, 1, 4, 1),
        "plain": (6, 1),
        "heads": (6, 1, 1),
        "out": (2, 4, 1),
    }
    reach = np.abs(x).max((0, 1, 2))
    np.testing.assert_allclose(nodes["conv"].divisor.ravel(), (reach / reach.max()) ** 0.75, rtol=1e-6)
    for path, weights in dequantize(nodes).items():
        factor = 1 if nodes[path].divisor is None else nodes[path].divisor
        assert np.abs((weights - params[path]) * factor).max() < 0.05 * np.abs(params[path] * factor).max()


def test_they_leave_others_more_codes_and_integers_give_the_same(case):
    params, x, found = case
    compute, plain = jax.jit(lambda tree, x: run(network, tree, x)), np.asarray(network(params, x))
    error = lambda tree: np.square(np.asarray(compute(tree, x)) - plain).mean() / plain.var()
    assert error(found[0.75]) < 0.1 * error(found[0.0])
    exact = {path: dataclasses.replace(node, integer=True) for path, node in found[0.75].items()}
    fake = np.asarray(compute(found[0.75], x))
    np.testing.assert_allclose(np.asarray(compute(exact, x)), fake, atol=2e-5 * np.abs(fake).max())


def test_a_file_holds_them_and_wrong_ones_are_refused(case):
    node = {"w": case[2][0.75]["out"]}
    arrays, kinds = saving.to_arrays(node), json.loads(json.dumps(saving.describe(node)))
    described = saving.Described(kinds, "folder")
    assert described.extra == {"w_scale", "w_range", "w_divisor"}
    (back,) = described.restore(arrays, {"w": SHAPES["out"]}).values()
    np.testing.assert_array_equal(back.dequantize(), node["w"].dequantize())
    right = arrays["w_divisor"]
    for wrong in (right[:1], right * 0, right * np.nan, right.astype(np.float64), right * np.float32(1e-40)):
        with pytest.raises(InputError, match=r"^folder: w has a divisor that is none"):
            described.restore({**arrays, "w_divisor": wrong}, {"w": SHAPES["out"]})
    with pytest.raises(InputError, match="speaks of inputs"):
        saving.Described([{**kinds[0], "divided": 1}], "folder")
    without = saving.describe({"w": dataclasses.replace(node["w"], divisor=None)})
    assert "divided" not in without[0]
