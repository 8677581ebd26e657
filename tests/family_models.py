"""What tests of encoder families share: random weights, a mirrored model, an encoder with all that it computes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]


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
