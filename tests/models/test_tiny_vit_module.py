"""TinyViT at widths that no original has: rectangles, folding, precision, features, groups of channels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables import tiny_vit as table
from converters.tables.strict import Converted, abstract
from helpers.family_models import SLIM_TINY_VIT, images_of, mirrored, random_params, run
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import layers, tiny_vit


@pytest.fixture(scope="module")
def small():
    return random_params(abstract(tiny_vit.ImageEncoder(SLIM_TINY_VIT)))


def test_folding_changes_nothing_but_the_tree(small):
    folded, config = tiny_vit.fold_batch_norm(small), dataclasses.replace(SLIM_TINY_VIT, batch_norm=False)
    assert tiny_vit.config_of(folded, SLIM_TINY_VIT.image_size) == config
    shapes = jax.tree.map(lambda leaf: leaf.shape, folded)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract(tiny_vit.ImageEncoder(config)))
    images = images_of(SLIM_TINY_VIT)
    expected, _ = run(tiny_vit.ImageEncoder(SLIM_TINY_VIT), small, images)
    np.testing.assert_allclose(run(tiny_vit.ImageEncoder(config), folded, images)[0], expected, atol=1e-5)


def test_a_folded_encoder_is_written_with_batch_norms_that_change_nothing(small):
    config = dataclasses.replace(SLIM_TINY_VIT, batch_norm=False)
    folded = tiny_vit.fold_batch_norm(small)
    head = Config(SLIM_TINY_VIT.image_size, 0, (), out_chans=16, decoder_heads=1, decoder_mlp_dim=8)
    params = {"image_encoder": folded, **random_params(table.abstract_head(head))}
    state = table.to_state_dict(Converted(config, head, params, {}))
    back = table.from_state_dict(state, image_size=SLIM_TINY_VIT.image_size)
    assert back.encoder == SLIM_TINY_VIT
    again = tiny_vit.fold_batch_norm(jax.tree.map(np.asarray, back.params["image_encoder"]))
    chex_equal(again, folded, 1e-6)


def chex_equal(found, wanted, rtol):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), found, wanted)


def test_a_mirrored_rectangle_gives_the_mirrored_embedding(small):
    """Rows and columns are told apart nowhere: windows, biases, strides, padding."""
    images = images_of(SLIM_TINY_VIT, 2)
    embedding, _ = run(tiny_vit.ImageEncoder(SLIM_TINY_VIT), small, images)
    assert embedding.shape == (2, *SLIM_TINY_VIT.grid, 16) and SLIM_TINY_VIT.grid == (4, 6)
    config = dataclasses.replace(SLIM_TINY_VIT, image_size=SLIM_TINY_VIT.image_size[::-1])
    other, _ = run(tiny_vit.ImageEncoder(config), mirrored(small), images.swapaxes(1, 2))
    np.testing.assert_allclose(other.swapaxes(1, 2), embedding, atol=2e-5)
    alone, _ = run(tiny_vit.ImageEncoder(SLIM_TINY_VIT), small, images[1:])
    np.testing.assert_allclose(alone[0], embedding[1], atol=2e-5)
    assert np.abs(embedding[0] - embedding[1]).max() > 0.1


def test_half_precision_and_remat(small):
    images = images_of(SLIM_TINY_VIT)
    expected, _ = run(tiny_vit.ImageEncoder(SLIM_TINY_VIT), small, images)
    half, features = run(tiny_vit.ImageEncoder(SLIM_TINY_VIT, jnp.bfloat16, remat=True), small, images)
    assert half.dtype == jnp.float32 and features["layers_1/blocks_0"]["out"].dtype == jnp.bfloat16
    assert 0 < np.abs(half - expected).mean() < 0.03 * np.abs(expected).mean()


def test_features_are_named_and_shaped():
    images = jax.ShapeDtypeStruct((2, *SLIM_TINY_VIT.image_size, 3), jnp.float32)
    params = abstract(tiny_vit.ImageEncoder(SLIM_TINY_VIT))
    _, features = jax.eval_shape(
        lambda p, x: tiny_vit.ImageEncoder(SLIM_TINY_VIT).apply({"params": p}, x), params, images
    )
    shape = lambda path, name: features[path][name].shape
    assert shape("patch", "hidden") == (2, 16, 24, 5) and shape("patch", "out") == (2, 8, 12, 8)
    assert shape("layers_0/blocks_1", "expanded") == (2, 8, 12, 7)
    assert shape("layers_0/downsample", "filtered") == (2, 4, 6, 11)
    assert shape("layers_1/blocks_1", "q") == shape("layers_1/blocks_1", "k") == (2 * 1 * 2, 5, 5, 3, 5)
    assert shape("layers_1/blocks_1", "heads") == (4, 5, 5, 3, 6) and shape("layers_1/blocks_1", "mlp") == (2, 4, 6, 9)
    assert shape("layers_2/blocks_0", "local") == (2, 4, 6, 12)
    sides = tiny_vit.features(SLIM_TINY_VIT, features)
    assert set(sides) == set(tiny_vit.STAGES)
    count = lambda side: {name: len(parts) for name, parts in sides[side].items()}
    assert count("embedding") == {"stem": 1, "conv": 2 * 4, "qkv": 3 * 3, "mlp": 3}
    assert count("bottleneck") == {"stream": 1 + 2 + 2 + 3 * 3}


STREAM = ("layers_0/downsample/conv3/bn/bias", "layers_1/blocks_0/attn/norm/bias", "layers_1/blocks_0/attn/q/kernel")


@pytest.mark.parametrize(
    ("paths", "stage"),
    [
        (STREAM, "embedding"),
        (("patch_embed_2/bn/bias", "layers_0/blocks_0/conv3/bn/bias", "layers_0/blocks_0/conv1/kernel"), "embedding"),
        (("patch_embed_2/bias", "layers_0/blocks_0/conv3/bias"), "embedding"),
        (("patch_embed_0/bn/bias", "patch_embed_2/kernel"), "bottleneck"),
        (("layers_0/blocks_0/conv2/bn/bias", "layers_0/blocks_0/conv3/kernel"), "bottleneck"),
        (("layers_1/blocks_0/attn/q/bias", "layers_1/blocks_0/attn/k/bias"), "bottleneck"),
        (("layers_1/blocks_0/mlp/fc1/bias", "layers_1/blocks_0/mlp/fc2/kernel"), "bottleneck"),
        (("neck_0/kernel", "neck_1/bias", "neck_2/kernel"), None),
    ],
)  # fmt: skip
def test_groups_belong_to_stages(paths, stage):
    for prefix in ("", "image_encoder/"):
        found = [name for name, holds in tiny_vit.STAGES.items() if holds([prefix + path for path in paths])]
        assert found == ([stage] if stage else [])


def test_cut_heads_keep_their_temperature(small):
    """Channels of q and k that are zero can go, if q is scaled."""
    cut = jax.tree.map(np.copy, small)
    attn = cut["layers_1"]["blocks_0"]["attn"]
    for name in "qk":
        attn[name] = {"kernel": attn[name]["kernel"][..., :3], "bias": attn[name]["bias"][..., :3]}
    masked = jax.tree.map(np.copy, small)
    for name in "qk":
        for leaf in masked["layers_1"]["blocks_0"]["attn"][name].values():
            leaf[..., 3:] = 0
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 10)).astype(np.float32)
    apply = lambda width, params: tiny_vit.Attention(tiny_vit.Block(2, width, 3, 17), (5, 5)).apply(
        {"params": params}, x
    )[0]
    kept = layers.keep_logit_scale(cut, small)["layers_1"]["blocks_0"]["attn"]
    wanted = apply(4, masked["layers_1"]["blocks_0"]["attn"])
    np.testing.assert_allclose(apply(3, kept), wanted, atol=1e-6)
    assert np.abs(apply(3, attn) - wanted).max() > 1e-4
