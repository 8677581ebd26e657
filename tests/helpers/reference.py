"""The original code's encoder of the golden vectors in ours, and what is compared of it."""

from __future__ import annotations

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from converters.tables.sam import rows
from slimsam_jax import pruning
from slimsam_jax.compression import selection, vit_groups
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.models.config import GLOBAL, Block, Config
from slimsam_jax.models.encoders.vit import ImageEncoder, config_of
from slimsam_jax.models.sam import Sam
from slimsam_jax.pruning.gradients import disturbed_loss

EMBEDDING, FIRST, BOTTLENECK, SECOND = RECIPES["slimsam"]  # the steps

HEADS, DEPTH = 12, 12

FULL = Config(
    image_size=(64, 64),
    embed_dim=96,
    blocks=tuple(Block(HEADS, 8, 384, GLOBAL if i in (2, 5, 8, 11) else 2) for i in range(DEPTH)),
)


def encoder_rows():
    return [row._replace(name=row.name[14:], path=row.path[14:]) for row in rows(FULL) if row.name.startswith("image_")]


def tree(golden, prefix: str):
    """Arrays under a prefix, by their PyTorch names, as our parameter tree."""
    flat = {row.path: jnp.asarray(row.to_ours(golden[prefix + row.name])) for row in encoder_rows()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def wide(golden) -> dict[str, np.ndarray]:
    """The vectors with float64 for float32, for computations under `jax.enable_x64`."""
    arrays = {name: golden[name] for name in golden}
    return {
        name: array.astype(np.float64 if array.dtype == np.float32 else array.dtype) for name, array in arrays.items()
    }


def model(golden, prefix: str) -> Sam:
    encoder = tree(golden, prefix)
    return Sam(config_of(encoder, like=FULL), {"image_encoder": encoder})


@functools.partial(jax.jit, static_argnames="config")
def run(config, encoder, images):
    return ImageEncoder(config).apply({"params": encoder}, images)


def images(golden):
    return golden["images"].transpose(0, 2, 3, 1)


def embed(golden, sam: Sam) -> np.ndarray:
    return np.asarray(run(sam.config, sam.params["image_encoder"], images(golden))[0]).transpose(0, 3, 1, 2)


def gradients(golden, sam: Sam, noise: np.ndarray):
    """The reference's: summed over images, one stored draw of noise for each."""

    @jax.jit
    def gradient(params, image, noise):
        function = lambda p, x: ImageEncoder(sam.config).apply({"params": p}, x)[0]
        loss = lambda p: disturbed_loss(function, p, image, function(params, image), noise)
        return jax.value_and_grad(loss)(params)

    pairs = zip(images(golden), noise.transpose(0, 1, 3, 4, 2), strict=True)
    losses, grads = zip(*(gradient(sam.params["image_encoder"], image[None], eps) for image, eps in pairs), strict=True)
    return np.array(losses), jax.tree.map(lambda *g: sum(g), *grads)


def removed(keep: np.ndarray, size: int, copies: int = 1) -> np.ndarray:
    """What the original lists: removed channels of the layer's own numbering, repeated over the heads."""
    gone = np.setdiff1d(np.arange(size), keep)
    return np.sort((gone + size * np.arange(copies)[:, None]).ravel())


def choose(sam: Sam, grads, step, ratio: float, uniform=False):
    return selection.choose(sam.config, sam.params["image_encoder"], grads, step, Target(ratio), uniform)


def assert_removed(golden, prefix: dict[str, str], keep, config: Config):
    for block in range(DEPTH):
        attention, mlp = keep[f"blocks_{block}/attn"], keep[f"blocks_{block}/mlp"]
        np.testing.assert_array_equal(
            removed(attention, config.blocks[block].head_dim, HEADS), golden[f"{prefix['attn']}/pruned/attn{block}"]
        )
        np.testing.assert_array_equal(
            removed(mlp, config.blocks[block].mlp_dim), golden[f"{prefix['mlp']}/pruned/mlp{block}"]
        )


def scores_of(sam: Sam, grads, kind: str, criterion: str = "taylor") -> dict[str, np.ndarray]:
    """Of the groups of a kind, which are found: "embedding", "attn" or "mlp"."""
    grouping = vit_groups.groups_of(sam.config)
    names = vit_groups.of_kind(grouping, kind)
    return pruning.score(sam.params["image_encoder"], grouping, grads, criterion, only=names)
