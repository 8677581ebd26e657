"""Losses of masks by a target of each, against EdgeSAM's own numbers and by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.shared import shared
from slimsam_jax.distillation.losses import absolute_error
from slimsam_jax.distillation.mask_losses import hardness, valid_loss


@pytest.fixture(scope="module")
def golden():
    with np.load(shared("golden/edge_sam.npz"), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name.startswith(("loop/", "loss/"))}


def loss_of(golden, weights, logits=None, valid=None):
    logits = golden["loop/student_logits"] if logits is None else logits
    valid = golden["loop/valid_low_res"][:, 0] if valid is None else valid
    target = (golden["loop/teacher_logits"] > 0).astype(np.float32)
    everything = np.ones(logits.shape[:2], np.float32)
    return valid_loss(logits, everything, target, valid, everything, weights)


def test_terms_are_those_of_edge_sam(golden):
    weights = {"bce": 5.0, "dice": 5.0, "focal": 0.0}
    value, terms, _ = loss_of(golden, weights)
    unmasked = loss_of(golden, weights, valid=np.ones((8, 32, 32), np.float32))[1]
    for name, term in terms.items():
        np.testing.assert_allclose(term, golden[f"loss/{name}_masked"], rtol=1e-5)
        if name != "focal":
            np.testing.assert_allclose(unmasked[name], golden[f"loss/{name}_unmasked"], rtol=1e-5)
    np.testing.assert_allclose(value, 5 * (terms["bce"] + terms["dice"]), rtol=1e-6)


def test_gradients_are_those_of_edge_sam(golden):
    """Half of the loss, as for two rounds."""
    weights = {"bce": 2.5, "dice": 2.5}
    found = jax.grad(lambda logits: loss_of(golden, weights, logits)[0])(golden["loop/student_logits"])
    wanted = golden["loss/grad_of_5bce_5dice_half"]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_outputs_that_do_not_learn_count_nothing():
    """A prompt with one output that learns weighs as much as one with two."""
    logits = jnp.array([[[[0.0]], [[9.0]]], [[[0.0]], [[0.0]]]])
    learns = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    zeros = jnp.zeros((2, 2))
    _, terms, actual = valid_loss(logits, zeros, jnp.ones((2, 2, 1, 1)), jnp.ones((2, 1, 1)), learns, {"bce": 1.0})
    np.testing.assert_allclose(terms["bce"], np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(actual, [[0, 1], [0, 0]])


def test_hard_masks_are_those_where_the_teacher_is_better():
    found = hardness(np.array([0.5, 0.25]), np.array([0.5, 0.75]))
    np.testing.assert_allclose(found, [0.499501, 0.8795365], atol=1e-6)  # sigmoids of 0.5/0.501 - 1 and 0.75/0.251 - 1
    assert hardness(np.array(0.0), np.array(0.0)) < 0.5 < hardness(np.array(0.0), np.array(0.1))


def test_absolute_errors_are_relative_to_the_target():
    target = jnp.array([[0.0, 2.0], [4.0, 6.0]])
    assert absolute_error(target + 1, target) == 0.5  # of a mean distance of 2
    assert absolute_error(10 * target + 10, 10 * target) == 0.5
    assert absolute_error(target + 1, target, jnp.array([[2.0], [0.0]])) == 0.5
    assert absolute_error(jnp.full((2, 2), 3.0), target) == 1


def test_absolute_errors_leave_padding_out_of_all_means():
    """As if it were not there, whatever lies in it; a cell that is half in the image counts half."""
    random = np.random.default_rng(0)
    student, target, weight = (random.standard_normal((2, 3, 4, 6)).astype(np.float32) for _ in range(3))
    valid = np.ones((2, 1, 4, 6), np.float32)
    valid[..., 4:] = 0
    inside = absolute_error(student[..., :4], target[..., :4], weight[..., :4])
    np.testing.assert_allclose(absolute_error(student, target, weight, valid), inside, rtol=1e-6)
    target[..., 4:] = 1e6
    np.testing.assert_allclose(absolute_error(student, target, weight, valid), inside, rtol=1e-5)
    half = absolute_error(jnp.array([1.0, 3.0]), jnp.array([0.0, 3.0]), 1.0, jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(half, (1 / 1.5) / ((1 * 1 + 0.5 * 2) / 1.5), rtol=1e-6)  # their mean is 1
