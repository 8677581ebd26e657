"""Attention of encoder families: the same in chunks as all at once, by hand, and bounded in memory."""

from __future__ import annotations

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax.models.encoders import attention


@pytest.mark.parametrize("biased", [False, True])
def test_attention_in_chunks_equals_all_at_once(monkeypatch, biased):
    """With its gradients, where chunks do not divide the queries, and q and v differ in width."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    inputs = [normal(2, 7, 3, 4), normal(2, 5, 3, 4), normal(2, 5, 3, 6)] + ([normal(3, 7, 5)] if biased else [])

    def value_and_gradients():  # compiled anew at each call
        def loss(*inputs):
            out = attention.attend(*inputs)
            return jnp.sin(out).sum(), out

        gradients, out = jax.jit(jax.grad(loss, range(len(inputs)), has_aux=True))(*inputs)
        return out, gradients

    expected, gradients = value_and_gradients()
    monkeypatch.setattr(attention, "logits_at_once", lambda: 2 * 5 * 3)  # three queries at a time
    seen = []
    monkeypatch.setattr(attention, "plain", lambda *_: seen.append(1))
    found, others = value_and_gradients()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for one, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6)
    assert not seen


def test_attention_by_hand():
    q, k, v = (np.array(x, np.float32) for x in ([[[[2]]]], [[[[0]], [[np.log(3)]]]], [[[[1]], [[5]]]]))
    np.testing.assert_allclose(attention.attend(q, k, v)[0, 0, 0], [(1 + 9 * 5) / 10], rtol=1e-6)
    bias = np.array([[[np.log(9), 0]]], np.float32)
    np.testing.assert_allclose(attention.attend(q, k, v, bias)[0, 0, 0], [3], rtol=1e-6)


def by_softmax(q, k, v, bias):
    logits = jnp.einsum("btnd,bsnd->bnts", q, k) / q.shape[-1] ** 0.5 + bias
    return jnp.einsum("bnts,bsne->btne", jax.nn.softmax(logits), v)


@pytest.mark.parametrize("limit", [10**6, 30])
def test_gradients_and_their_derivatives_are_those_of_the_formula(monkeypatch, limit):
    """In float64, all at once and in chunks; `pruning.hessian_diagonal` differentiates a gradient forward."""
    monkeypatch.setattr(attention, "logits_at_once", lambda: limit)
    with jax.enable_x64(True):
        random = np.random.default_rng(1)
        shapes = ((2, 7, 3, 4), (2, 5, 3, 4), (2, 5, 3, 6), (3, 7, 5))
        inputs, along = (tuple(jnp.asarray(random.standard_normal(shape)) for shape in shapes) for _ in range(2))

        def twice(attend):
            gradient = jax.grad(lambda inputs: jnp.sin(attend(*inputs)).sum())
            return jax.jit(lambda inputs, along: jax.jvp(gradient, (inputs,), (along,)))(inputs, along)

        chex.assert_trees_all_close(twice(attention.attend), twice(by_softmax), rtol=1e-12, atol=1e-13)


def test_gradients_in_half_precision_are_near():
    random = np.random.default_rng(2)
    inputs = [random.standard_normal(shape) for shape in ((2, 7, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8), (3, 7, 5))]
    loss = lambda attend: jax.grad(lambda inputs: (attend(*inputs) ** 2).sum())
    expected = loss(by_softmax)([jnp.asarray(x, jnp.float32) for x in inputs])
    half = loss(attention.attend)([jnp.asarray(x, jnp.bfloat16) for x in inputs])
    for one, other in zip(half, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.abs(one - other).mean() < 0.02 * np.abs(other).mean()


def test_the_backward_pass_asks_for_no_logits_to_be_kept():
    arrays = [jnp.zeros((2, 40, 3, 4))] * 3
    _, pull = jax.vjp(attention.attend, *arrays)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) <= arrays[0].size


def test_no_array_of_all_logits_at_1024_pixels():
    """The largest array that tracing meets, forward and backward, is far from heads x 4096 x 4096."""
    shapes = [jax.ShapeDtypeStruct((1, 4096, 3, 64), jnp.float32)] * 3
    traced = jax.make_jaxpr(jax.grad(lambda *qkv: attention.attend(*qkv).sum(), (0, 1, 2)))(*shapes)
    assert max(sizes(traced.jaxpr)) <= 2**21


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)
