"""TinySAM's scheme on a function: which scales it gives to whom, and what they leave of the error that counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax.quantization import dequantize, saving, tinysam_function
from slimsam_jax.quantization.layers import find_layers
from slimsam_jax.quantization.running import run
from slimsam_jax.quantization.tinysam_function import Search, quantize, squared_gradients

QUICK = Search(1, (0.1, 1.2, 12))
TOWARDS = np.array([3.0, 0.01], np.float32)  # only one of the outputs matters


def network(params, x):
    x = jnp.tanh(x @ params["first"]["kernel"])
    x = jax.nn.gelu(x @ params["second"]["kernel"], approximate=False)
    return x @ params["third"]["kernel"]


def matters(result, key):
    return (jax.random.rademacher(key, result.shape, result.dtype) * TOWARDS * result).sum()


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    shapes = {"first": (3, 8), "second": (8, 16), "third": (16, 2)}
    params = {name: {"kernel": random.standard_t(3, shape).astype(np.float32)} for name, shape in shapes.items()}
    return params, random.standard_normal((30, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def found(case):
    params, x = case
    return quantize(network, params, (x,), matters, (4, 4), QUICK)


def test_gradients_are_those_of_the_outputs(case):
    params, x = case
    function = find_layers(network, params, x)
    layers = {layer.path: layer for layer in function.layers}
    seen, weights = squared_gradients(function, layers, (params, x), matters, jax.random.key(0))
    np.testing.assert_allclose(weights["third/kernel"], np.broadcast_to(TOWARDS**2, (30, 2)), rtol=1e-6)
    np.testing.assert_array_equal(seen["first/kernel"], x)
    assert seen["third/kernel"].min() < 0 and weights["second/kernel"].shape == (30, 16)


def test_ranges_are_of_three_kinds(found):
    spans = {name: each["kernel"].range for name, each in found.items()}
    assert spans["first"] is None  # it reads the image
    assert spans["second"].shape == (2,) and spans["second"][1] == 8
    assert spans["third"].shape == (3,) and spans["third"][2] == np.float32(0.16997124 / 8)
    assert all(np.unique(each["kernel"].scale).size == 1 for each in found.values())


def test_the_search_leaves_less_of_what_matters(case, found):
    params, x = case
    error = lambda tree: float(np.square((run(network, tree, x) - network(params, x)) * TOWARDS).sum())
    largest = quantize(network, params, (x,), matters, (4, 4), Search(1, (1.0, 1.0, 1)))
    blind = quantize(network, params, (x,), lambda result, key: matters(result[:, ::-1], key), (4, 4), QUICK)
    assert error(found) < 0.9 * error(largest) and error(found) < error(blind)
    assert not np.array_equal(run(network, found, x), network(dequantize(found), x))


def test_two_ranges_go_into_a_file_and_back(found):
    node = found["third"]["kernel"]
    flat = {"w/kernel": node}
    described, arrays = saving.Described(saving.describe(flat), "folder"), saving.to_arrays(flat)
    back = described.restore(arrays, {"w/kernel": node.shape})["w/kernel"]
    np.testing.assert_array_equal(back.range, node.range)
    for wrong in ([0.1, 1, 0.1], [0.1, 0, -0.1], [0.0, 0, 0.1]):
        with pytest.raises(ValueError, match="range that is none"):
            described.restore({**arrays, "w/kernel_range": np.array(wrong, np.float32)}, {"w/kernel": node.shape})
    assert dataclasses.replace(back, codes=0, scale=0, range=0) == dataclasses.replace(node, codes=0, scale=0, range=0)


def test_what_ends_a_little_below_zero_is_not_behind_a_gelu():
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    assert tinysam_function.after_gelu(jax.nn.gelu(x, approximate=False))
    assert not tinysam_function.after_gelu(np.clip(x, -0.1, None)) and not tinysam_function.after_gelu(x)
