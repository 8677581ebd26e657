"""Small SAMs with random weights, and images as they take them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from slimsam_jax.models.config import GLOBAL, Block, Config
from slimsam_jax.models.encoders.vit import ImageEncoder
from slimsam_jax.models.sam import Params, Sam, abstract_params


def tiny_config(image_size=(64, 48), embed_dim=24, heads=2, head_dim=12, mlp_dim=40, **kw) -> Config:
    """A rectangular SAM with a window block that needs padding (3 does not divide 4) and a global one."""
    blocks = (Block(heads, head_dim, mlp_dim, 3), Block(heads, head_dim, mlp_dim, GLOBAL))
    small = {"out_chans": 32, "decoder_mlp_dim": 48, "iou_head_dim": 32, "mask_in_chans": 8}
    return Config(image_size=image_size, embed_dim=embed_dim, blocks=blocks, **{**small, **kw})


def random_sam(config: Config, seed: int = 0) -> Sam:
    """Random weights without zeros, so that every array matters to the output."""
    shapes = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    random = np.random.default_rng(seed)

    def array(path, leaf):
        spread = 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1])))  # keeps activations near 1
        return (path[-1].key == "scale") + (spread * random.standard_normal(leaf.shape)).astype(np.float32)

    structure = jax.tree.structure(abstract_params(config))
    leaves = [array(path, leaf) for path, leaf in shapes]
    return Sam(config, jax.tree.unflatten(structure, leaves), {"source": "random"})


def random_images(config: Config, count: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as `data.Batches` gives it; the last image does not fill its frame."""
    random = np.random.default_rng(seed)
    height, width = config.image_size
    sizes = np.full((count, 2), (height, width), np.int32)
    sizes[-1] = (height, width - 5)
    return {"image": random.integers(0, 256, (count, height, width, 3), np.uint8), "size": sizes}


def embed(sam: Sam, images: np.ndarray) -> np.ndarray:
    """Normalised images [b, h, w, 3] -> [b, grid height, grid width, C], by one program: eagerly it would be eighty."""
    return np.asarray(_encoder(sam.config, sam.params["image_encoder"], images)[0])


@functools.partial(jax.jit, static_argnums=0)
def _encoder(config: Config, params: Params, images: jax.Array):
    return ImageEncoder(config).apply({"params": params}, images)


SQUARE = tiny_config(image_size=(64, 64))

# As pruning leaves it: heads, channels and MLPs differ, and the embedding fits none of them.
UNEVEN = dataclasses.replace(SQUARE, embed_dim=13, blocks=(Block(2, 5, 17, 3), Block(3, 8, 40, GLOBAL)))
