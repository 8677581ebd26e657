"""An encoder drawn so that its residual stream fills all directions evenly, as projections like least."""

from __future__ import annotations

import jax
import numpy as np

from experiments.isotropic import draw, isotropic, moments
from helpers.models import random_sam, tiny_config


def test_the_patch_embedding_is_white_and_the_rest_the_sams():
    like, random = random_sam(tiny_config()), np.random.default_rng(0)
    height, width = like.config.image_size
    image = random.integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    batch = {"image": image, "size": np.tile(np.int32([height, width]), (8, 1))}
    sam = isotropic(like, [batch], 0)
    mean, moment = moments(sam.config, sam.encoder, [batch])
    np.testing.assert_allclose(mean, 0, atol=1e-4)
    np.testing.assert_allclose(moment, np.eye(len(moment)), atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, sam.params["mask_decoder"], like.params["mask_decoder"])


def test_kernels_keep_the_size_of_what_they_read():
    random = np.random.default_rng(0)
    for path, shape, inputs in ((("q", "kernel"), (192, 6, 32), 192), (("proj", "kernel"), (6, 32, 192), 192)):
        np.testing.assert_allclose(draw(path, shape, random).std(), inputs**-0.5, rtol=0.02)
    assert draw(("norm1", "scale"), (4,), random).tolist() == [1] * 4
    assert draw(("pos_embed",), (4,), random).tolist() == [0] * 4
