"""Choosing the basis: with nothing cut nothing changes, and what is cut is the least that can be."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from conftest import random_images, random_sam, tiny_config

from slimsam_jax.models import groups as channels
from slimsam_jax.models import projection as sam_projection
from slimsam_jax.models.features import run_encoder
from slimsam_jax.models.groups import shrunk_config
from slimsam_jax.pruning import masks, projection

RANDOM = np.random.default_rng(0)


def moment(size: int, rank: int | None = None) -> np.ndarray:
    samples = RANDOM.standard_normal((400, rank or size)) @ RANDOM.standard_normal((rank or size, size))
    return samples.T @ samples / 400


def test_residual_basis_keeps_means_and_what_varies():
    low_rank = moment(12, rank=4)
    basis = projection.residual_basis(low_rank, 6)
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-12)
    x = RANDOM.standard_normal((5, 12))
    np.testing.assert_allclose((x @ basis.T).mean(1) * 6**0.5, x.mean(1) * 12**0.5, atol=1e-12)
    # Four directions, centred, and the all-ones direction: six of twelve dimensions hold everything.
    values, vectors = np.linalg.eigh(low_rank)
    used = vectors[:, values > 1e-9]
    np.testing.assert_allclose(basis.T @ basis @ used, used, atol=1e-9)


@pytest.mark.parametrize("width", [1, 2, 12])
def test_residual_basis_of_any_width_is_orthonormal(width):
    for matrix in (moment(12), np.zeros((12, 12))):
        basis = projection.residual_basis(matrix, width)
        np.testing.assert_allclose(basis @ basis.T, np.eye(width), atol=1e-12)


def test_bilinear_basis_is_exact_when_nothing_is_cut_and_best_when_something_is():
    left, right = moment(6), moment(6)
    full = projection.bilinear_basis(left, right, 6)
    np.testing.assert_allclose(full.left.T @ full.right, np.eye(6), atol=1e-10)
    half = projection.bilinear_basis(left, right, 3)
    # E[(q·k - (Aq)·(Bk))²] is the sum of the squared singular values left out (Eckart and Young).
    missing = np.eye(6) - half.left.T @ half.right
    error = np.trace(missing.T @ left @ missing @ right)
    np.testing.assert_allclose(error, (half.singular_values[3:] ** 2).sum(), rtol=1e-9)
    drop = np.diag([1.0, 1, 1, 0, 0, 0])
    assert error < np.trace((np.eye(6) - drop) @ left @ (np.eye(6) - drop) @ right)


def test_output_basis_is_exact_when_nothing_is_cut_and_loses_what_it_says():
    covariance, weights = moment(6), RANDOM.standard_normal((9, 6))
    full = projection.output_basis(covariance, weights.T @ weights, 6)
    np.testing.assert_allclose(full.decode @ full.encode, np.eye(6), atol=1e-10)
    half = projection.output_basis(covariance, weights.T @ weights, 3)
    missing = weights @ (np.eye(6) - half.decode @ half.encode)
    np.testing.assert_allclose(np.trace(missing @ covariance @ missing.T), (half.singular_values[3:] ** 2).sum())


def test_units_that_repeat_others_are_worth_nothing():
    base = RANDOM.standard_normal((500, 3)) * [3, 2, 1]
    activations = np.concatenate([base, base @ RANDOM.standard_normal((3, 2))], axis=1)
    weights = RANDOM.standard_normal((5, 4))
    centred = activations - activations.mean(0)
    covariance = centred.T @ centred / 500
    order, gains = projection.choose_units(covariance, weights)
    assert sorted(order) == list(range(5)) and (np.diff(gains) <= 0).all()
    assert gains[2] > 1e-3 > 1e-5 > gains[3]
    kept = np.sort(order[:3])
    new, bias = projection.refit(covariance, activations.mean(0), weights, kept, ridge=1e-12)
    np.testing.assert_allclose(activations[:, kept] @ new + bias, activations @ weights, atol=1e-6)


@pytest.fixture(scope="module")
def model():
    return random_sam(tiny_config())


@functools.partial(jax.jit, static_argnames="config")
def embed(config, encoder, batch):
    return run_encoder(config, encoder, batch)[0]


def accumulate(statistics, encoder, batches):
    return sam_projection.accumulate(statistics, jax.tree.map(jax.numpy.asarray, encoder), batches)


def batches(model):
    return [random_images(model.config, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("kind", ["embedding", "attention", "mlp"])
def test_nothing_cut_nothing_changed(model, kind):
    """A rectangle whose windows need padding."""
    config, encoder = model.config, model.params["image_encoder"]
    if kind == "embedding":
        moment = accumulate(sam_projection.stream_moment(config), encoder, batches(model))
        new = sam_projection.project_embedding(config, encoder, moment, config.embed_dim)
    elif kind == "attention":
        moments = accumulate(sam_projection.attention_moments(config), encoder, batches(model))
        new = sam_projection.project_attention(config, encoder, moments, [b.head_dim for b in config.blocks])
    else:
        moments = accumulate(sam_projection.mlp_moments(config), encoder, batches(model))
        units = sam_projection.hidden_units(encoder, moments)
        new = sam_projection.project_mlp(encoder, units, [b.mlp_dim for b in config.blocks])
    assert shrunk_config(config, new) == config
    expected, found = (embed(config, e, batches(model)[0]) for e in (encoder, new))
    # The refit has a ridge, so it is exact only up to that.
    np.testing.assert_allclose(found, expected, atol=2e-3 if kind == "mlp" else 5e-5)


def test_attention_that_uses_five_channels_loses_nothing_when_cut_to_five(model):
    """Also the softmax temperature: it must not follow the width."""
    config, groups = model.config, channels.attention_groups(model.config)
    keep = {group.name: np.arange(5) for group in groups}
    encoder = model.params["image_encoder"]
    encoder = masks.apply_masks(encoder, masks.mask_tree(encoder, groups, keep))
    moments = accumulate(sam_projection.attention_moments(config), encoder, batches(model))
    new = sam_projection.project_attention(config, encoder, moments, [5, 5])
    batch = batches(model)[0]
    np.testing.assert_allclose(embed(shrunk_config(config, new), new, batch), embed(config, encoder, batch), atol=1e-4)


def test_everything_cut_at_once_has_the_widths_asked_for(model):
    config, encoder = model.config, model.params["image_encoder"]
    moment = accumulate(sam_projection.stream_moment(config), encoder, batches(model))
    encoder = sam_projection.project_embedding(config, encoder, moment, 11)
    config = shrunk_config(config, encoder)
    moments = accumulate(sam_projection.attention_moments(config), encoder, batches(model))
    worth = sam_projection.attention_spectra(config, encoder, moments)
    assert all((np.diff(w) <= 1e-9).all() and w.shape == (12,) for w in worth.values())
    encoder = sam_projection.project_attention(config, encoder, moments, [3, 7])
    config = shrunk_config(config, encoder)
    moments = accumulate(sam_projection.mlp_moments(config), encoder, batches(model))
    encoder = sam_projection.project_mlp(encoder, sam_projection.hidden_units(encoder, moments), [13, 5])
    config = shrunk_config(config, encoder)
    assert config.embed_dim == 11 and [(b.head_dim, b.mlp_dim) for b in config.blocks] == [(3, 13), (7, 5)]
    assert np.isfinite(embed(config, encoder, batches(model)[0])).all()


def test_statistics_need_a_batch(model):
    with pytest.raises(ValueError, match="at least one batch"):
        accumulate(sam_projection.stream_moment(model.config), model.params["image_encoder"], [])
