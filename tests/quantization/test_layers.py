"""Layers of a function from its equations, and what they see of data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax import quantization
from slimsam_jax.errors import InputError
from slimsam_jax.quantization.gptq import error_of
from slimsam_jax.quantization.layers import find_layers
from slimsam_jax.quantization.running import run
from slimsam_jax.quantization.weights import from_matrix, quantize_array, to_matrix

CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def network(params, x):
    """[b, 6, 5, 4] -> layers of all kinds, each with its own input; the outputs of all but the shared projections."""
    conv = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", **CONV) + params["bias"]
    depth = jax.lax.conv_general_dilated(jnp.tanh(conv), params["depth"], (2, 1), "SAME", feature_group_count=6, **CONV)
    heads = jnp.einsum("bhwc,cnd->bhwnd", jnp.sin(depth), params["heads"])
    other = jnp.einsum("bhwc,cnd->bhwnd", jnp.sin(depth), params["other"])
    out = jnp.einsum("nde,bhwnd->bhwe", params["out"], heads * other * params["unused"])  # the parameter comes first
    own = jnp.einsum("bhwnd,nde->bhwne", heads, params["own"])  # each head has inputs of its own
    flat = out.reshape(-1, 5) @ params["flat"].reshape(5, -1).astype(jnp.float32)
    return {"conv": conv - params["bias"], "depth": depth, "heads": heads, "out": out, "own": own, "flat": flat}


SHAPES = {
    **{"conv": (3, 3, 4, 6), "bias": (6,), "depth": (3, 2, 1, 6), "heads": (6, 2, 3), "other": (6, 2, 3)},
    **{"out": (2, 3, 5), "own": (2, 3, 4), "flat": (5, 2, 2), "unused": ()},
}
AXES = {"conv": (0, 1, 2), "depth": (0, 1, 2), "heads": (0,), "out": (0, 1), "own": (1,), "flat": (0,)}


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(1)
    return [(random.standard_normal((2, 6, 5, 4)).astype(np.float32) + 0.5,) for _ in range(2)]


@pytest.fixture(scope="module")
def seen(params, batches):
    return quantization.capture(network, params, batches, percentiles=(90.0,))


@pytest.fixture(scope="module")
def outputs(params, batches):
    """By one program, over both batches."""
    run = jax.jit(network)
    return jax.tree.map(lambda *each: np.concatenate(each), *(jax.device_get(run(params, *batch)) for batch in batches))


def test_every_layer_is_there_and_nothing_else(params, batches):
    found = find_layers(network, params, *batches[0])
    assert {layer.path: layer.axes for layer in found.layers} == {**AXES, "other": (0,)}
    again = found.run(jax.tree.leaves((params, *batches[0])))
    np.testing.assert_allclose(again["flat"], network(params, *batches[0])["flat"], rtol=1e-6)


@pytest.mark.parametrize("name", AXES)
def test_moments_are_those_of_the_inputs(name, seen, params, outputs):
    """Of every output channel the mean square is w M w, if M and w have their inputs in one order."""
    own, matrix = seen[name], to_matrix(params[name], AXES[name])
    powers = np.array([error_of(matrix[:, [c]], own.moment[g])[0] for c, g in enumerate(own.group_of)])
    means = np.array([matrix[:, c] @ own.mean[g] for c, g in enumerate(own.group_of)])
    # Channels of a kernel and of the result: only a product that has heads as a batch has them in another order.
    expected = outputs[name].reshape(-1, len(own.group_of)).astype(np.float64)
    np.testing.assert_allclose(powers, (expected**2).mean(0), rtol=2e-5)
    np.testing.assert_allclose(means, expected.mean(0), rtol=1e-3, atol=1e-5)


def test_layers_of_one_input_share_its_moment(seen, batches):
    np.testing.assert_array_equal(seen["heads"].moment, seen["other"].moment)
    x = np.concatenate([x for (x,) in batches])
    assert (seen["conv"].range.low, seen["conv"].range.high) == (x.min(), x.max())
    low, high = np.mean([np.quantile(x, (0.1, 0.9)) for (x,) in batches], axis=0)
    np.testing.assert_allclose(seen["conv"].range.percentiles[90.0], (low, high), rtol=1e-5)


def test_nothing_to_calibrate_with(params, batches):
    with pytest.raises(InputError, match="no images to calibrate with"):
        quantization.capture(network, params, [])
    broken = {**params, "conv": params["conv"] * np.float32(np.nan)}
    with pytest.raises(InputError, match=r"input of depth has values that are not finite"):
        quantization.capture(lambda p, x: network(p, x)["depth"], broken, batches[:1])


@pytest.mark.parametrize("axes", [(0,), (0, 1), (1,), (2,), (1, 2)])
def test_a_matrix_goes_back(axes):
    array = np.arange(24).reshape(2, 3, 4)
    matrix = to_matrix(array, axes)
    assert len(matrix) == np.prod([array.shape[axis] for axis in axes])
    np.testing.assert_array_equal(from_matrix(matrix, array.shape, axes), array)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("method", ["absmax", "search", "gptq"])
def test_integers_stand_for_what_they_replace(name, method, seen, params):
    found = quantize_array(params[name], seen[name], 8, method=method)
    assert (found.shape, found.axes, found.bits) == (params[name].shape, AXES[name], 8)
    assert [size for axis, size in enumerate(found.scale.shape) if axis in found.axes] == [1] * len(found.axes)
    # GPTQ moves weights by a few steps, for the sake of others.
    steps = np.abs(found.dequantize() - params[name]) / found.scale
    assert steps.max() <= (8 if method == "gptq" else 0.51 if method == "absmax" else 30)
    assert np.abs(found.codes).max() == 127 or method != "absmax"


def test_a_kernel_that_is_moved_runs_within_jit_too():
    """Reshaped, transposed, and with axes of length 1 put in by indexing."""

    def function(params, x):
        x = jnp.tanh(x @ params["turned"].T)
        x = jax.lax.conv_general_dilated(x[:, None], params["line"][None], (1, 1), "SAME", **CONV)
        return jnp.tanh(x[:, 0]).reshape(len(x), -1) @ params["flat"].reshape(-1, 4)

    random = np.random.default_rng(0)
    shapes = {"turned": (6, 3), "line": (3, 6, 5), "flat": (7, 5, 4)}
    params = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    x = random.standard_normal((2, 7, 3)).astype(np.float32)
    statistics = quantization.capture(function, params, [(x,)])
    assert set(statistics) == set(shapes)
    slim = quantization.quantize(params, statistics)
    once, within_jit = (wrap(lambda params, x: run(function, params, x))(slim, x) for wrap in (lambda f: f, jax.jit))
    np.testing.assert_allclose(within_jit, once, atol=1e-5)
    np.testing.assert_allclose(once, function(params, x), atol=0.05 * np.abs(function(params, x)).max())
    with pytest.raises(InputError, match=r"inputs of shapes \[\(1, 7, 3\)\], and the first one's are \[\(2, 7, 3\)\]"):
        quantization.capture(function, params, [(x,), (x[:1],)])
