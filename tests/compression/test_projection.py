"""Choosing the basis: with nothing cut nothing changes, and what is cut is the least that can be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import written_groups
from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax.compression.projection import attention, mlp, statistics
from slimsam_jax.compression.projection import embedding as sam_projection
from slimsam_jax.models.encoders.vit import config_of
from slimsam_jax.models.sam import encoder_for, preprocess, run_encoder
from slimsam_jax.pruning.bases import bilinear_basis, choose_units, output_basis, refit, residual_basis
from slimsam_jax.pruning.shrink import apply_masks, mask_tree

RANDOM = np.random.default_rng(0)


def moment(size: int, rank: int | None = None) -> np.ndarray:
    samples = RANDOM.standard_normal((400, rank or size)) @ RANDOM.standard_normal((rank or size, size))
    return samples.T @ samples / 400


def test_residual_basis_keeps_means_and_what_varies():
    low_rank = moment(12, rank=4)
    basis = residual_basis(low_rank, 6)
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
        basis = residual_basis(matrix, width)
        np.testing.assert_allclose(basis @ basis.T, np.eye(width), atol=1e-12)


def test_bilinear_basis_is_exact_when_nothing_is_cut_and_best_when_something_is():
    left, right = moment(6), moment(6)
    basis = bilinear_basis(left, right)
    np.testing.assert_allclose(basis.left.T @ basis.right, np.eye(6), atol=1e-10)
    # E[(q·k - (Aq)·(Bk))²] is the sum of the squared singular values left out (Eckart and Young).
    missing = np.eye(6) - basis.left[:3].T @ basis.right[:3]
    error = np.trace(missing.T @ left @ missing @ right)
    np.testing.assert_allclose(error, (basis.singular_values[3:] ** 2).sum(), rtol=1e-9)
    drop = np.diag([1.0, 1, 1, 0, 0, 0])
    assert error < np.trace((np.eye(6) - drop) @ left @ (np.eye(6) - drop) @ right)


def test_output_basis_is_exact_when_nothing_is_cut_and_loses_what_it_says():
    covariance, weights = moment(6), RANDOM.standard_normal((9, 6))
    basis = output_basis(covariance, weights.T @ weights)
    np.testing.assert_allclose(basis.decode @ basis.encode, np.eye(6), atol=1e-10)
    tiny = output_basis(covariance, 1e-8 * weights.T @ weights)
    np.testing.assert_allclose(tiny.encode, basis.encode, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(tiny.encode, axis=1), np.linalg.norm(tiny.decode, axis=0))
    missing = weights @ (np.eye(6) - basis.decode[:, :3] @ basis.encode[:3])
    np.testing.assert_allclose(np.trace(missing @ covariance @ missing.T), (basis.singular_values[3:] ** 2).sum())


def test_units_that_repeat_others_are_worth_nothing():
    base = RANDOM.standard_normal((500, 3)) * [3, 2, 1]
    repeats = base @ RANDOM.standard_normal((3, 2))
    activations = np.concatenate([base, repeats], axis=1) + np.arange(1, 6)  # as after a GELU, not centred
    weights = RANDOM.standard_normal((5, 4))
    centred = activations - activations.mean(0)
    covariance = centred.T @ centred / 500
    order, gains = choose_units(covariance, weights)
    assert sorted(order) == list(range(5)) and (np.diff(gains) <= 0).all()
    assert gains[2] > 1e-3 > 1e-5 > gains[3]
    assert choose_units(covariance, weights, 2)[0].tolist() == order[:2].tolist()
    kept = np.sort(order[:3])
    new, bias = refit(covariance, activations.mean(0), weights, kept, ridge=1e-12)
    assert np.abs(bias).max() > 1
    np.testing.assert_allclose(activations[:, kept] @ new + bias, activations @ weights, atol=1e-6)


WEIGHTINGS = ("none", "disturbed")


@pytest.fixture(scope="module")
def model():
    return random_sam(tiny_config())


@functools.partial(jax.jit, static_argnames="config")
def embed(config, encoder, batch):
    return run_encoder(config, encoder, batch)[0]


def batches(model):
    return [random_images(model.config, seed=seed) for seed in range(3)]


def moments(model, encoder, *parts):
    statistic = statistics.moments_of(config_of(encoder, like=model.config), parts)
    return statistics.accumulate(statistic, jax.tree.map(jnp.asarray, encoder), batches(model))


def project(model, encoder, kind: str, widths, weighting: str, masked: bool = False):
    """One of the three cuts, on statistics of the encoder as it is."""
    config = config_of(encoder, like=model.config)
    if kind == "embedding":
        return sam_projection.project_embedding(config, encoder, moments(model, encoder, "stream")["stream"], widths)
    found = moments(model, encoder, kind, "sensitivity")
    if kind == "attention":
        bases = attention.head_bases(encoder, found, weighting)
        return attention.project_heads(encoder, bases, widths, widths, masked)
    return mlp.project_mlp(encoder, mlp.hidden_units(encoder, found, weighting), widths)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_cut_nothing_changed(model, weighting):
    """In float64, the rotations after one another, then the refit; on a rectangle whose windows need padding."""
    with jax.enable_x64():
        config = model.config
        encoder = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.params["image_encoder"])
        new = project(model, encoder, "embedding", config.embed_dim, weighting)
        new = project(model, new, "attention", [b.head_dim for b in config.blocks], weighting)
        assert config_of(new, like=config) == config and new["pos_embed"].dtype == jnp.float64
        found, expected = (embed(config, e, batches(model)[0]) for e in (new, encoder))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=1e-9)
        new = project(model, encoder, "mlp", [b.mlp_dim for b in config.blocks], weighting)
        # The refit has a ridge, so it is exact only up to that.
        np.testing.assert_allclose(embed(config, new, batches(model)[0]), expected, atol=2e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_attention_that_uses_five_channels_loses_nothing_when_cut_to_five(model, weighting):
    """Also the softmax temperature: it must not follow the width."""
    config, groups = model.config, written_groups.attention_groups(model.config)
    keep = {group.name: np.arange(5) for group in groups}
    encoder = model.params["image_encoder"]
    encoder = apply_masks(encoder, mask_tree(encoder, groups, keep))
    new = project(model, encoder, "attention", [5, 5], weighting)
    batch = batches(model)[0]
    np.testing.assert_allclose(embed(config_of(new, like=config), new, batch), embed(config, encoder, batch), atol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_masked_heads_are_cut_heads_in_the_shapes_that_there_were(model, weighting):
    encoder, batch = model.params["image_encoder"], batches(model)[0]
    cut, masked = (project(model, encoder, "attention", [3, 7], weighting, masked=masked) for masked in (False, True))
    assert config_of(masked, like=model.config) == model.config != config_of(cut, like=model.config)
    found, wanted = (embed(config_of(each, like=model.config), each, batch) for each in (masked, cut))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_everything_cut_at_once_has_the_widths_asked_for(model, weighting):
    encoder = project(model, model.params["image_encoder"], "embedding", 11, weighting)
    encoder = project(model, encoder, "attention", [3, 7], weighting)
    encoder = project(model, encoder, "mlp", [13, 5], weighting)
    config = config_of(encoder, like=model.config)
    assert config.embed_dim == 11 and [(b.head_dim, b.mlp_dim) for b in config.blocks] == [(3, 13), (7, 5)]
    assert np.isfinite(embed(config, encoder, batches(model)[0])).all()


def test_unweighted_worth_is_the_share_of_the_stream_that_would_be_wrong(model):
    """The first block's MLP without its last units, refitted: the stream behind it errs by what they were worth."""
    config, encoder = model.config, jax.tree.map(jnp.asarray, model.params["image_encoder"])
    found = moments(model, encoder, "mlp")
    units = mlp.hidden_units(encoder, found, "none")
    slim = mlp.project_mlp(encoder, units, [30, 40])
    error = total = 0.0
    for batch in batches(model):
        before, after = (
            run_encoder(config_of(e, like=config), e, batch)[1]["blocks_0"]["out"] for e in (encoder, slim)
        )
        error += np.square(after - before).sum()
        total += np.square(before - before.mean(-1, keepdims=True)).sum()
    np.testing.assert_allclose(units[0].gains[30:].sum(), error / total, rtol=0.05)


@pytest.fixture(scope="module")
def four_heads():
    """A configuration, its encoder, images, and their moments.

    MLPs write six times what they do at random, so that an error before them is worth something else than behind them.
    """
    config = tiny_config(heads=4, head_dim=6)
    encoder = jax.tree.map(jnp.asarray, random_sam(config).params["image_encoder"])
    for i in range(2):
        lin2 = encoder[f"blocks_{i}"]["mlp_lin2"]
        lin2["kernel"] = 6 * lin2["kernel"]
    images = [random_images(config, seed=seed) for seed in range(12)]
    parts = ["attention", "mlp", "sensitivity"]
    return config, encoder, images, statistics.accumulate(statistics.moments_of(config, parts), encoder, images)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_weighted_worth_is_the_share_of_the_embedding_that_is_wrong(four_heads, block, kind):
    """Half of six channels cut in four heads of one block, where logits and outputs err about as much; or of an MLP."""
    config, encoder, images, found = four_heads
    width, whole = (3, 6) if kind == "attention" else (20, 40)
    widths = [width if i == block else whole for i in (0, 1)]
    if kind == "attention":
        groups = attention.head_bases(encoder, found, "disturbed")
        slim = attention.project_heads(encoder, groups, widths, widths)
    else:
        groups = mlp.hidden_units(encoder, found, "disturbed")
        slim = mlp.project_mlp(encoder, groups, widths)
    after = config_of(slim, like=config)
    error = sum(np.square(embed(after, slim, batch) - embed(config, encoder, batch)).sum() for batch in images)
    np.testing.assert_allclose(groups[block].gains[width:].sum(), error / found["embedding"], rtol=0.12)


def test_padding_of_windows_is_left_out_where_nobody_reads_it(model):
    """4 x 3 tokens in windows of 3: two windows of nine, six of eighteen tokens padding."""
    found = moments(model, model.params["image_encoder"], "attention")["attention"]
    assert [m["tokens"] for m in found] == [6 * 12, 6 * 12] and [m["keys"] for m in found] == [6 * 18, 6 * 12]
    _, features = run_encoder(model.config, model.params["image_encoder"], batches(model)[0])

    def real(name):
        windows = np.asarray(features["blocks_0"][name]).reshape(2, 2, 3, 3, 2, 12)
        return np.concatenate([windows[:, 0].reshape(-1, 2, 12), windows[:, 1, :1].reshape(-1, 2, 12)])

    one = statistics.accumulate(
        statistics.moments_of(model.config, ["attention"]),
        jax.tree.map(jnp.asarray, model.params["image_encoder"]),
        batches(model)[:1],
    )
    first, heads, q = one["attention"][0], real("heads"), real("q")
    np.testing.assert_allclose(first["output_sum"], heads.sum(0), rtol=1e-4)
    np.testing.assert_allclose(first["output"], np.einsum("tni,tnj->nij", heads, heads), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(first["q"], np.einsum("tni,tnj->ij", q, q) / 2, rtol=1e-4, atol=1e-4)
    every = np.asarray(features["blocks_0"]["k"]).reshape(-1, 12)  # padding is a key like others
    np.testing.assert_allclose(first["k"], every.T @ every / 2, rtol=1e-4, atol=1e-4)


def test_sensitivity_is_the_jacobian_of_the_embedding(model):
    """JᵀJ of every token's every channel by finite differences; all of it, as one direction may agree by luck."""
    config, encoder = model.config, jax.tree.map(jnp.asarray, model.params["image_encoder"])
    images = [random_images(config, seed=0)]
    many = statistics.accumulate(statistics.moments_of(config, ["sensitivity"]), encoder, images * 300)
    pixels = preprocess(config, images[0]["image"], images[0]["size"])
    network, step = encoder_for(config, 2, jnp.float32), 1e-2
    shifts = jax.tree.map(jnp.zeros_like, network.init(jax.random.key(0), pixels)["perturbations"])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def shifted(at_tokens, channel):
        last = {**shifts["blocks_1"], "out": shifts["blocks_1"]["out"] + at_tokens[None, ..., None] * channel}
        return network.apply({"params": encoder, "perturbations": {**shifts, "blocks_1": last}}, pixels)[0]

    exact, channels_ = np.zeros((config.embed_dim, config.embed_dim)), np.eye(config.embed_dim, dtype=np.float32)
    plain = shifted(np.zeros(config.grid), channels_)
    for token in np.ndindex(config.grid):  # one by one: the neck mixes neighbours
        at_tokens = np.zeros(config.grid)
        at_tokens[token] = step
        jacobian = np.reshape((shifted(at_tokens, channels_) - plain) / step, (config.embed_dim, -1))
        exact += jacobian @ jacobian.T
    error = np.linalg.norm(many["sensitivity"]["out"][1] / 300 - exact) / np.linalg.norm(exact)
    assert error < 0.1  # with one draw of noise for all batches 0.7


def test_statistics_need_a_batch(model):
    with pytest.raises(ValueError, match="at least one batch"):
        statistics.accumulate(statistics.moments_of(model.config, ["stream"]), model.params["image_encoder"], [])
