"""What tests of encoder families share: random weights, a mirrored model, an encoder with all that it computes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from slimsam_jax.models import sam2_head
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.efficient_sam_head import HeadConfig
from slimsam_jax.models.encoders import efficient_sam_vit, hiera, rep_vit, tiny_vit
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.sam import Sam, abstract_params

Tree = dict[str, Any]
# Every kind of layer, widths that fit nothing, windows that are padded, one of them wider than its grid is high.
SLIM_TINY_VIT = tiny_vit.Config(
    image_size=(32, 48),
    stem_dim=5,
    conv_dim=8,
    conv_blocks=(12, 7),
    stages=(
        tiny_vit.Stage(10, 5, (Block(2, 4, 3, 17), Block(3, 5, 6, 9)), 11, 2),
        tiny_vit.Stage(12, 6, (Block(2, 3, 4, 13),), 14, 1),
    ),
    out_chans=16,
)
SLIM_VIT = efficient_sam_vit.Config(
    image_size=(48, 32), embed_dim=10, blocks=(Block(2, 4, 3, 17), Block(3, 5, 6, 9)), pretrain_grid=4, out_chans=16
)

# Widths that fit nothing, squeeze-excite in all kinds of blocks, a coarsest stage of one row.
SLIM_REP_VIT = rep_vit.Config(
    image_size=(32, 64),
    stem_dim=5,
    stages=(
        rep_vit.Stage(8, (rep_vit.Block(12, 3),)),
        rep_vit.Stage(10, (rep_vit.Block(7), rep_vit.Block(9, 2))),
        rep_vit.Stage(12, (rep_vit.Block(11, 4),)),
        rep_vit.Stage(6, (rep_vit.Block(13),)),
    ),
    fuse_dim=9,
    out_chans=16,
)

# Widths that fit nothing, windows that are padded, one of them pooled, a block in the midst that is global.
SLIM_HIERA = hiera.Config(
    image_size=(64, 96),
    stages=(
        hiera.Stage(8, 8, (Block(1, 4, 3, 9),)),
        hiera.Stage(10, 6, (Block(2, 5, 3, 7),)),
        hiera.Stage(12, 6, (Block(2, 3, 4, 13), Block(3, 6, 5, 14))),
        hiera.Stage(14, 3, (Block(4, 2, 3, 15),)),
    ),
    global_blocks=(3,),
    pos_grid=(3, 2),
    out_chans=16,
)

# What sam2's own class holds.
SMALL_HIERA = dataclasses.replace(
    hiera.uniform(8, 1, (1, 1, 2, 1), (3,), (8, 4, 6, 3), (3, 3), image_size=64), out_chans=16
)


def random_params(shapes: Tree, seed: int = 0) -> Tree:
    """Without zeros, so that every array matters; variances positive, activations near 1."""
    random = np.random.default_rng(seed)

    def array(path, leaf):
        fan = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 16
        values = random.standard_normal(leaf.shape) / np.sqrt(max(1, fan))
        values = np.exp(values) if path[-1].key == "var" else values
        return ((path[-1].key == "scale") + values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(array, shapes)


def mirrored(params: Tree) -> Tree:
    """The encoder that gives the mirror image of what `params` gives, of a mirrored image: rows become columns."""

    def mirror(path, leaf):
        name = path[-1].key
        if name == "kernel" and leaf.ndim == 4 and leaf.shape[0] == leaf.shape[1]:
            return np.swapaxes(leaf, 0, 1)
        if name == "attention_biases":
            return np.swapaxes(leaf, 1, 2)
        if name == "pos_embed":
            side = round((len(leaf) - 1) ** 0.5)
            grid = leaf[1:].reshape(side, side, -1)
            return np.concatenate([leaf[:1], np.swapaxes(grid, 0, 1).reshape(side * side, -1)])
        return leaf

    return jax.tree_util.tree_map_with_path(mirror, params)


@functools.partial(jax.jit, static_argnames="encoder")
def run(encoder, params: Tree, images):
    """(embedding, features)."""
    return encoder.apply({"params": params}, images)


@functools.partial(jax.jit, static_argnames="encoder")
def run_all(encoder, params: Tree, images):
    """Embedding, features, and what every module gives, by path: {"layers_0/blocks_1": ...}."""
    (embedding, features), kept = encoder.apply(
        {"params": params}, images, capture_intermediates=True, mutable=["intermediates"]
    )
    flat = {}

    def collect(tree, path):
        for name, part in tree.items():
            if name == "__call__":
                flat["/".join(path)] = part[0][0] if isinstance(part[0], tuple) else part[0]
            else:
                collect(part, (*path, name))

    collect(kept["intermediates"], ())
    return embedding, features, flat


def images_of(config, count: int = 1, seed: int = 0) -> np.ndarray:
    """Normalised random images [count, H, W, 3]."""
    return np.random.default_rng(seed).standard_normal((count, *config.image_size, 3)).astype(np.float32)


def edge_sam(encoder: rep_vit.Config | tiny_vit.Config = SLIM_REP_VIT, seed: int = 0) -> Sam:
    """A small EdgeSAM with random weights, of any encoder."""
    sizes = {"out_chans": encoder.out_chans, "mask_in_chans": 4, "decoder_mlp_dim": 8, "iou_head_dim": 8}
    head = head_of(encoder.image_size, encoder.stride, **sizes, decoder_heads=2, decoder_depth=1)
    config = SamConfig(encoder, head)
    return Sam(config, random_params(abstract_params(config), seed))


def tiny_vit_sam(encoder: tiny_vit.Config = SLIM_TINY_VIT, seed: int = 0) -> Sam:
    """A small MobileSAM with random weights, of any encoder: its head is as EdgeSAM's."""
    return edge_sam(encoder, seed)


def efficient_sam(encoder: efficient_sam_vit.Config = SLIM_VIT, seed: int = 0) -> Sam:
    """A small EfficientSAM with random weights, of any encoder."""
    sizes = {"patch_size": encoder.patch_size, "out_chans": encoder.out_chans}
    head = HeadConfig(encoder.image_size, **sizes, decoder_mlp_dim=8, iou_head_dim=6, upscaling_dims=(5, 3))
    config = SamConfig(encoder, head)
    return Sam(config, random_params(abstract_params(config), seed))


def sam2(encoder: hiera.Config = SLIM_HIERA, seed: int = 0) -> Sam:
    """A small SAM 2 with random weights, of any encoder."""
    sizes = {"out_chans": encoder.out_chans, "mask_in_chans": 4, "decoder_heads": 2}
    head = sam2_head.HeadConfig(encoder.image_size, **sizes, decoder_mlp_dim=8, iou_head_dim=6)
    config = SamConfig(encoder, head)
    return Sam(config, random_params(abstract_params(config), seed))
