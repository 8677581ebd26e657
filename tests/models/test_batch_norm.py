"""Running statistics of batch norms: no optimizer touches them, data estimates them anew, inference folds them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from converters.tables.strict import abstract
from helpers.family_models import SLIM_TINY_VIT, images_of, random_params, run
from slimsam_jax.distillation.step import make_optimizer
from slimsam_jax.models import sam
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.encoders import layers, tiny_vit


@pytest.fixture(scope="module")
def encoder():
    return tiny_vit.ImageEncoder(SLIM_TINY_VIT), random_params(abstract(tiny_vit.ImageEncoder(SLIM_TINY_VIT)))


def statistics(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if name.endswith(("bn/mean", "bn/var"))}


def test_no_optimizer_touches_them(encoder):
    """With weight decay, clipping, and whatever gradient: they stay to the bit, and all else moves."""
    part = {name: encoder[1][name] for name in ("patch_embed_0", "neck_1")}
    optimizer, learns = make_optimizer(clip=1.0, weight_decay=0.1, decayed=layers.learning), layers.learning(part)
    assert learns["patch_embed_0"]["bn"] == {"scale": True, "bias": True, "mean": False, "var": False}
    grads = jax.tree.map(lambda leaf, moves: np.full(leaf.shape, np.float32(moves)), part, learns)

    @jax.jit
    def step(params):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, jax.tree.map(lambda u: 1e-2 * u, updates))

    after = jax.device_get(step(part))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), part, after)
    assert moved == learns and len(statistics(part)) == 2


def test_they_are_estimated_from_all_images_together(encoder):
    """The first layer's are exact, however the images are cut into batches; no other leaf changes."""
    module, params = encoder
    images = images_of(SLIM_TINY_VIT, 4)
    found = layers.recalibrate(module, params, [images[:2], images[2:]])
    stem = layers.ConvNorm(SLIM_TINY_VIT.stem_dim, 3, 2, batch_norm=False)
    kernel = {"kernel": params["patch_embed_0"]["kernel"], "bias": jnp.zeros(SLIM_TINY_VIT.stem_dim)}
    x = np.asarray(stem.apply({"params": kernel}, images), np.float64)
    new = found["patch_embed_0"]["bn"]
    np.testing.assert_allclose(new["mean"], x.mean((0, 1, 2)), atol=1e-6)
    # Each batch's own variance is the unbiased one, as PyTorch remembers it.
    np.testing.assert_allclose(new["var"], x.var((0, 1, 2)), rtol=1e-2)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for leaf, same, learns in zip(*map(jax.tree.leaves, (found, params, layers.learning(params))), strict=True):
        assert (leaf is same) == learns
    # Normalised by them, what leaves a batch norm has mean and variance 1 again: a second estimate finds the same.
    rest = {name: leaf for name, leaf in statistics(found).items()}
    assert all(np.isfinite(leaf).all() for leaf in rest.values()) and min(v.min() for v in rest.values()) > -1e3
    again = statistics(layers.recalibrate(module, found, [images[:2], images[2:]]))
    for name, leaf in rest.items():
        np.testing.assert_allclose(again[name], leaf, rtol=1e-5, atol=1e-5, err_msg=name)


def test_inference_folds_them(encoder):
    config = SamConfig(SLIM_TINY_VIT, head_of(SLIM_TINY_VIT.image_size, 8, out_chans=16))
    module, params = encoder
    images = np.random.default_rng(0).integers(0, 256, (1, *SLIM_TINY_VIT.image_size, 3), np.uint8)
    sizes = np.array([SLIM_TINY_VIT.image_size])
    text = sam.encode.lower(config, {"image_encoder": params}, images, sizes).as_text()
    names = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layer_norms = sum(name.endswith(("normscale", "neck_1scale", "neck_3scale")) for name in names)
    assert text.count("stablehlo.rsqrt") == layer_norms == 8  # those of batch norms are powers, of channels alone
    found = sam.encode(config, {"image_encoder": params}, images, sizes)
    expected, _ = run(module, params, sam.preprocess(config, images, sizes))
    np.testing.assert_allclose(found, expected, atol=2e-5)
