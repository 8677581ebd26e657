"""Convolutions and products for CPUs against JAX's own; what the backward pass keeps of them and of GELU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax.models.encoders import layers
from slimsam_jax.models.encoders.convolutions import convolve, dense_convolution, depthwise, product

SIZES = [((2, 6, 8, 3), 3), ((1, 7, 5, 4), 3), ((2, 5, 6, 1), 3), ((1, 6, 7, 2), 5), ((2, 5, 4, 3), 1)]


def arrays(shape, taps):
    random = np.random.default_rng(0)
    return [random.standard_normal(s).astype(np.float32) for s in (shape, (taps, taps, 1, shape[-1]))]


def kept(function, *inputs):
    """Shapes of what the backward pass keeps."""
    return sorted(leaf.shape for leaf in jax.tree.leaves(jax.vjp(function, *inputs)[1]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "taps"), SIZES)
def test_shifted_images_are_a_depthwise_convolution(shape, taps, stride):
    """In value and in both gradients, those of a loss that weights every output differently."""
    inputs = arrays(shape, taps)
    own = lambda x, kernel: depthwise(x, kernel, stride)
    wanted = lambda x, kernel: convolve(x, kernel, stride, groups=shape[-1])
    np.testing.assert_allclose(own(*inputs), wanted(*inputs), atol=1e-5)
    pulled = [jax.jit(jax.grad(lambda *a, f=f: jnp.square(f(*a)).sum(), (0, 1)))(*inputs) for f in (own, wanted)]
    for found, expected in zip(*pulled, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_a_dense_kernel_is_that_of_a_convolution(stride):
    """And of the image; sides that the stride does not divide."""
    random = np.random.default_rng(0)
    x, kernel = (random.standard_normal(s).astype(np.float32) for s in ((2, 7, 6, 3), (3, 3, 3, 4)))
    loss = lambda function: lambda *inputs: jnp.sin(function(*inputs, stride)).sum()
    pulled = [jax.jit(jax.grad(loss(form), (0, 1)))(x, kernel) for form in (dense_convolution, convolve)]
    for found, expected in zip(*pulled, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(("axes", "shape"), [(1, (5, 7)), (1, (5, 2, 3)), (2, (3, 5, 4))])
def test_the_gradient_of_a_product_is_that_of_jax(dtype, axes, shape):
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.standard_normal(s), dtype) for s in ((2, 4, 3, 5), shape))
    forms = (product, jnp.tensordot)
    slopes = [jax.grad(lambda *a, f=f: jnp.sin(f(*a, axes)).sum(), (0, 1))(x, kernel) for f in forms]
    for found, expected in zip(*slopes, strict=True):
        assert found.dtype == dtype
        error = 1e-5 if dtype == np.float32 else 0.02 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=error)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_half_precision_have_its_type_and_are_near(stride):
    inputs = arrays((2, 6, 7, 3), 3)
    halves = [jnp.asarray(array, jnp.bfloat16) for array in inputs]
    slopes = jax.grad(lambda x, kernel: jnp.square(depthwise(x, kernel, stride).astype(jnp.float32)).sum(), (0, 1))
    for half, whole in zip(slopes(*halves), slopes(*(array.astype(jnp.float32) for array in halves)), strict=True):
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(np.float32), whole, rtol=0.03, atol=0.02 * np.abs(whole).max())


def test_the_backward_pass_keeps_the_padded_image_alone():
    x, kernel = arrays((2, 6, 8, 3), 3)
    assert kept(lambda *inputs: depthwise(*inputs), x, kernel) == [(2, 8, 10, 3), (3, 3, 1, 3)]


def test_gelu_is_the_exact_one_and_keeps_its_input_alone():
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    exact = lambda x: jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(layers.gelu(x), exact(x), atol=2e-6)
    slope = lambda function: jax.vmap(jax.grad(function))(x)
    np.testing.assert_allclose(slope(layers.gelu), slope(exact), atol=2e-6)
    assert kept(layers.gelu, x) == [x.shape]


def test_gelu_of_half_precision_is_rounded_once():
    x = np.linspace(-4, 4, 257, dtype=np.float32)
    half = jnp.asarray(x, jnp.bfloat16)
    wanted = jax.nn.gelu(half.astype(jnp.float32), approximate=False).astype(jnp.bfloat16)
    np.testing.assert_allclose(*(array.astype(np.float32) for array in (layers.gelu(half), wanted)), rtol=0.01)
