"""TinySAM's quantisers against vectors of the original code, and the search for their scales."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.golden_tinysam import cases
from slimsam_jax.errors import InputError
from slimsam_jax.quantization import tinysam

CASES = cases()
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def quantized(case):
    """Both operands of a case as TinySAM's classes quantise them."""
    sd = {name.removeprefix("sd/"): value for name, value in case.items() if name.startswith("sd/")}
    bits = {name.removeprefix("geom/"): int(case[name]) for name in case if name.endswith("_bit")}
    kind, x = str(case["class"]), case["in0"]
    if "MatMul" in kind:
        second = tinysam.fake_blocks(case["in1"], _blocks(sd["B_interval"]), bits["B_bit"])
        if "Post" in kind:
            return tinysam.fake_post_softmax(x, sd["A_interval"], sd["split"], bits["A_bit"]), second
        return tinysam.fake_blocks(x, _blocks(sd["A_interval"]), bits["A_bit"]), second
    if "Conv" in kind:
        first = tinysam.fake_shifted(x, sd["a_interval"], sd["a_bias"], bits["a_bit"])
        return first, tinysam.fake(sd["weight"], sd["w_interval"], bits["w_bit"])
    weights = tinysam.fake_blocks(sd["weight"], _blocks(sd["w_interval"][None]), bits["w_bit"])
    how = tinysam.fake_post_gelu if "Post" in kind else tinysam.fake
    return tinysam.fake_blocks(x, sd["a_interval"][:, 0], bits["a_bit"], how), weights


def _blocks(interval):
    """[1, groups, 1, rows, 1, columns, 1] of a product -> [groups, rows, columns]; [1, rows, 1, columns, 1] of a
    layer's weights -> [rows, columns]."""
    return interval[0].reshape([size for axis, size in enumerate(interval.shape[1:]) if axis % 2 == 0])


def output(case, first, second):
    kind = str(case["class"])
    bias = case.get("sd/bias", np.float32(0))
    if "MatMul" in kind:
        return first @ second
    if "Conv" not in kind:
        return first @ second.T + bias
    bias = bias.reshape(-1, 1, 1) if np.ndim(bias) else bias
    if "Transpose" in kind:  # windows of the size of the steps: every position by itself
        out = jnp.einsum("bihw,iojk->bohjwk", first, second)
        b, o, h, j, w, k = out.shape
        return out.reshape(b, o, h * j, w * k) + bias
    steps, pads = case["geom/stride"], [(int(p), int(p)) for p in case["geom/padding"]]
    groups = int(case["geom/groups"])
    return jax.lax.conv_general_dilated(first, second, steps, pads, feature_group_count=groups) + bias


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_original(name):
    case = CASES[name]
    first, second = quantized(case)
    ours = [case[f"quant_{key}"] for key in (("A", "B") if "quant_A" in case else ("in", "weight"))]
    if "a32" not in name:  # whose inputs the original rounds to integers on request, and does not where it computes
        close(first, ours[0])
    close(second, ours[1])
    np.testing.assert_allclose(output(case, first, second), case["out"], rtol=1e-5, atol=2e-5)


def test_the_search_finds_scales_that_are_better_than_the_largest_value():
    random = np.random.default_rng(0)
    x, weights = random.standard_t(3, (40, 8)).astype(np.float32), random.standard_normal((8, 6)).astype(np.float32)
    hessian = random.random((40, 6)).astype(np.float32) ** 2
    blocks = [(1,), (1, 2)]
    product = lambda operands: operands[0] @ operands[1]
    error = lambda intervals: float(
        (
            hessian
            * (product([quantize(a, i, 4) for a, i in zip((x, weights), intervals, strict=True)]) - x @ weights) ** 2
        ).sum()
    )
    quantize = tinysam.fake_blocks
    start = [np.full(shape, tinysam.largest_interval(a, 4)) for shape, a in zip(blocks, (x, weights), strict=True)]
    found = tinysam.search(product, [x, weights], [quantize] * 2, [4, 4], hessian, 2, blocks, (0.1, 1.2, 12))
    assert [each.shape for each in found] == blocks and found[1][0, 0] != found[1][0, 1]
    assert error(found) < 0.7 * error(start)
    unweighted = tinysam.search(product, [x, weights], [quantize] * 2, [4, 4], 1.0, 2, blocks, (0.1, 1.2, 12))
    assert error(found) < error(unweighted)  # the Hessian guides it
    with pytest.raises(InputError, match="0 rounds"):
        tinysam.search(product, [x, weights], [quantize] * 2, [4, 4], 1.0, 0)
