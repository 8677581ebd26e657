"""Integers in a tree: how they are rounded, kept in a file, and computed with."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax.errors import InputError
from slimsam_jax.limits import WEIGHT_BITS, check_weight_group
from slimsam_jax.quantization import Quantized, Range, Statistics, dequantize, quantize, ranges, saving
from slimsam_jax.quantization.codes import pack, packed_size, unpack
from slimsam_jax.quantization.gptq import error_of, fitted, search
from slimsam_jax.quantization.running import run
from slimsam_jax.quantization.sensitivity import sensitivity
from slimsam_jax.quantization.weights import quantize_array

CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def correlated(inputs=32, rank=6, tokens=400, seed=0):
    """[tokens, inputs] of low rank and a little noise, as features are."""
    random = np.random.default_rng(seed)
    low = random.standard_normal((tokens, rank)) @ random.standard_normal((rank, inputs))
    return low + 0.05 * random.standard_normal((tokens, inputs))


def statistics(x, axes=(0,), outputs=5):
    moment = (x.T @ x / len(x))[None]
    span = Range(float(x.min()), float(x.max()))
    return Statistics(axes, np.zeros(outputs, int), moment, x.mean(0)[None], len(x), span)


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).standard_normal((32, 5))


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_gptq_leaves_the_least_error(bits, group, weights):
    x = correlated()
    errors = {}
    for method in ("absmax", "search", "gptq"):
        found = quantize_array(weights, statistics(x), bits, group, method)
        assert found.groups == (32 // group if group else 1)
        errors[method] = error_of(np.asarray(found.dequantize(), np.float64) - weights, statistics(x).moment[0]).sum()
    assert errors["gptq"] < 0.2 * errors["absmax"]
    assert errors["search"] <= 1.3 * errors["absmax"]  # it sees no correlations


def test_without_correlations_gptq_rounds_to_the_nearest(weights):
    scale = np.full(weights.shape, 0.1)
    codes, _ = search(weights, np.diag(np.arange(1.0, 33)), scale[:1], (-100, 100), (1.0,))
    np.testing.assert_array_equal(codes, np.round(weights / 0.1))
    # The best scale of codes that are exact is theirs.
    np.testing.assert_allclose(fitted(codes * 0.07, codes, scale[:1], np.eye(32)), 0.07 * np.ones((1, 5)))


def test_channels_of_zeros_stay_zero():
    found = quantize_array(np.zeros((32, 5)), statistics(correlated()), 4)
    assert not np.any(found.dequantize()) and np.all(found.scale > 0)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_codes_go_into_a_file_and_back(bits):
    high = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(0).integers(-high - (bits < 8), high + 1, (3, 5, 7))
    packed = pack(codes, bits)
    assert packed.nbytes == packed_size(105, bits) == -(-105 * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, (3, 5, 7)).astype(int), codes)


def test_four_bits_have_the_first_of_two_codes_low():
    np.testing.assert_array_equal(pack(np.array([1, -2, 7, -8]), 4), [0xE1, 0x87])


def test_what_a_file_holds_is_what_is_read():
    plain = np.ones(3, np.float32)
    integers = quantize_array(np.arange(64.0).reshape(2, 16, 2), statistics(correlated(), (0, 1), 2), 4, 16)
    integers = dataclasses.replace(integers, range=np.array([0.5, 3], np.float32), input_bits=6)
    flat = {"a/kernel": integers, "a/bias": plain}
    arrays, kinds = saving.to_arrays(flat), json.loads(json.dumps(saving.describe(flat)))
    assert {name: array.shape for name, array in arrays.items()} == {
        **{"a/kernel": (32,), "a/kernel_scale": (2, 1, 2), "a/kernel_range": (2,), "a/bias": (3,)},
    }
    described = saving.Described(kinds, "folder")
    assert (described.paths, described.extra) == ({"a/kernel"}, {"a/kernel_scale", "a/kernel_range"})
    back = described.restore(arrays, {"a/kernel": (2, 16, 2)})["a/kernel"]
    np.testing.assert_array_equal(back.dequantize(), integers.dequantize())
    assert dataclasses.replace(back, codes=0, scale=0, range=0) == dataclasses.replace(
        integers, codes=0, scale=0, range=0
    )
    for name, wrong in (
        ("a/kernel", arrays["a/kernel"][1:]),
        ("a/kernel_scale", arrays["a/kernel_scale"] * np.nan),
        ("a/kernel_scale", arrays["a/kernel_scale"][:, :, :1]),
        ("a/kernel_scale", arrays["a/kernel_scale"] * 0 + np.float32(3e38)),  # times a code it is infinite
        ("a/kernel_range", np.array([-1, 3], np.float32)),
        ("a/kernel_range", np.array([3e38, 3], np.float32)),
        ("a/kernel_range", np.array([np.nan, 3], np.float32)),
    ):
        with pytest.raises(InputError, match=r"^folder: a/kernel "):
            described.restore({**arrays, name: wrong}, {"a/kernel": (2, 16, 2)})
    for field, value, message in (
        ("bits", 17, "17 bits"),
        ("inputs", 8.0, "inputs that there are not"),
        ("arrays", [5], "names of its arrays"),
        ("arrays", "a/kernel", "names of its arrays"),
    ):
        with pytest.raises(InputError, match=f"^folder: .*{message}"):
            saving.Described([{**kinds[0], field: value}], "folder")


@pytest.mark.parametrize("name", ["w_scale", "w_range"])
def test_arrays_of_the_wrong_size_are_refused_unread(name):
    """Of a foreign file they are views of any size: nothing is allocated before the size is right."""
    kind = {"bits": 8, "axes": [0], "inputs": 8, "integer": False, "arrays": ["w"]}
    described = saving.Described([kind], "folder")
    right = {"w": np.ones((4, 2), np.int8), "w_scale": np.ones((1, 2), np.float32), "w_range": np.ones(2, np.float32)}
    assert described.restore(right, {"w": (4, 2)})["w"].shape == (4, 2)
    huge = np.broadcast_to(np.float32(1), (1 << 13, 1 << 13)[: right[name].ndim])
    tracemalloc.start()
    with pytest.raises(InputError, match=r"^folder: w "):
        described.restore({**right, name: huge}, {"w": (4, 2)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000


@pytest.mark.parametrize("bits", [1, 17, 8.0, True])
def test_bits_that_there_are_not(bits, weights):
    with pytest.raises(InputError, match="bits"):
        quantize({"w": weights}, {"w": statistics(correlated())}, bits)


def test_other_choices_that_there_are_not(weights):
    seen = {"w": statistics(correlated())}
    with pytest.raises(InputError, match="values that are not finite"):
        quantize({"w": weights * np.nan}, seen)
    with pytest.raises(InputError, match="none of gptq"):
        quantize({"w": weights}, seen, method="best")
    with pytest.raises(InputError, match="another shape"):
        quantize({"w": weights[1:]}, seen)
    for group in (3, 8, -16, 16.0):
        with pytest.raises(InputError, match="power of two"):
            check_weight_group(group)


def test_a_bias_makes_up_for_the_mean_error(weights):
    x = correlated() + 3
    params = {"kernel": weights.astype(np.float32), "bias": np.zeros(5, np.float32)}
    found = quantize(params, {"kernel": statistics(x)}, 3, method="absmax", bias_correction=True)
    error = x @ (np.asarray(found["kernel"].dequantize()) - params["kernel"]) + found["bias"]
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-4)


def test_a_range_includes_zero_exactly():
    scale, zero = ranges.static(Range(-1.0, 3.1), 8)
    assert zero == np.round(zero) and ranges.fake(jnp.zeros(1), (scale, zero)) == 0
    assert list(ranges.static(Range(1.0, 2.55), 8)) == [np.float32(0.01), 0]
    x = jnp.linspace(-1, 3.1, 99)
    assert np.abs(ranges.fake(x, (scale, zero)) - x).max() <= 0.501 * scale
    assert ranges.static(Range(-9, 9, {99.0: (-1.0, 1.0)}), 8, 99.0)[0] == np.float32(2 / 255)
    for span, percentile, bits in ((Range(0, np.nan), None, 8), (Range(0, 1), 99.9, 8), (Range(0, 1), None, 1)):
        with pytest.raises(InputError):
            ranges.static(span, bits, percentile)


def network(params, x):
    """Convolutions that pad, of one position, strided by groups; heads, and a product whose parameter comes first."""
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", **CONV) + 0.1
    x = jax.lax.conv_general_dilated(jnp.tanh(x), params["point"], (1, 1), "VALID", **CONV)
    x = jnp.tanh(jnp.einsum("bhwc,cnd->bhwnd", x, params["heads"]))
    x = jnp.einsum("nde,bhwnd->bhwe", params["out"], x) + params["bias"]
    return jax.lax.conv_general_dilated(x, params["depth"], (2, 2), "SAME", feature_group_count=4, **CONV)


SHAPES = {
    "conv": (3, 3, 2, 3),
    "point": (1, 1, 3, 3),
    "heads": (3, 2, 4),
    "out": (2, 4, 4),
    "depth": (3, 3, 1, 4),
    "bias": (4,),
}
AXES = {"conv": (0, 1, 2), "point": (0, 1, 2), "heads": (0,), "out": (0, 1), "depth": (0, 1, 2)}


@pytest.fixture(scope="module")
def case():
    """Parameters, integers whose layers' inputs have no range yet, and an input."""
    random = np.random.default_rng(3)
    params = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    integers = dict(params)
    for name, axes in AXES.items():
        inputs = int(np.prod([SHAPES[name][axis] for axis in axes]))
        outputs = params[name].size // inputs
        seen = Statistics(axes, np.zeros(outputs, int), np.eye(inputs)[None], np.zeros((1, inputs)), 9, Range(-1, 1))
        integers[name] = quantize_array(params[name], seen, 8, method="absmax")
    return params, integers, random.standard_normal((2, 5, 4, 2)).astype(np.float32)


def with_ranges(integers, span, integer, bits=8):
    give = lambda leaf: dataclasses.replace(leaf, range=span, integer=integer, input_bits=bits)
    return {name: give(leaf) if isinstance(leaf, Quantized) else leaf for name, leaf in integers.items()}


@pytest.mark.parametrize("span", [np.array([0.05, 90], np.float32), np.zeros(0, np.float32)], ids=["static", "token"])
def test_products_of_integers_are_those_of_what_they_stand_for(span, case):
    params, integers, x = case
    compute = jax.jit(lambda tree, x: run(network, tree, x))
    fake, exact = (np.asarray(compute(with_ranges(integers, span, integer), x)) for integer in (False, True))
    np.testing.assert_allclose(exact, fake, atol=2e-5 * np.abs(fake).max())
    plain = np.asarray(network(params, x))
    assert 1e-4 < np.abs(fake - plain).max() / np.abs(plain).max() < (0.05 if len(span) == 0 else 0.3)
    text = compute.lower(with_ranges(integers, span, True), x).as_text()
    assert sum("i8>" in line and ("dot_general" in line or "convolution" in line) for line in text.splitlines()) == 5
    few = np.asarray(compute(with_ranges(integers, span, False, 3), x)) if len(span) == 0 else fake
    assert np.abs(few - plain).max() >= np.abs(fake - plain).max()


def test_without_ranges_integers_are_what_they_stand_for(case):
    _, integers, x = case
    np.testing.assert_array_equal(run(network, integers, x), network(dequantize(integers), x))


def test_each_layer_by_itself(case):
    params, integers, x = case
    coarse = with_ranges(integers, np.zeros(0, np.float32), False, 4)
    rows = sensitivity(network, params, {**coarse, "heads": integers["heads"]}, [(x,)])
    assert set(rows) == set(AXES)
    assert rows["heads"][0] == rows["heads"][1] and rows["out"][1] > 5 * rows["out"][0] > 0
    # By hand for one of them, its input as it is.
    plain, one = network(params, x), network({**params, "out": integers["out"].dequantize()}, x)
    np.testing.assert_allclose(rows["out"][0], np.square(one - plain).mean() / plain.var(), rtol=1e-2)
    with pytest.raises(InputError, match="needs images"):
        sensitivity(network, params, coarse, [])
