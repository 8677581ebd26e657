"""Hiera with a feature pyramid, SAM 2's image encoder: images -> three maps, features.

Shapes: b images, h x w tokens of a stage, D its channels, n heads, d channels per head of q and k, e of v, M MLP
channels. Names follow `sam2`, with q, k and v apart. Each of the four stages has a residual stream of its own. The
first block of a later one pools queries and shortcut by maxima of 2 x 2, so channels of the later streams can be
selected, not rotated.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.imaging.bicubic import bicubic_matrix
from slimsam_jax.models.encoders.attention import attend
from slimsam_jax.models.encoders.hiera_config import (
    KERNEL,
    PATCH,
    PRESETS,
    Config,
    Place,
    Stage,
    config_of,
    narrowed,
    places,
    uniform,
)
from slimsam_jax.models.encoders.hiera_config import STAGES as COUNT
from slimsam_jax.models.encoders.layers import Dense, DenseGeneral, gelu, keep_logit_scale
from slimsam_jax.models.encoders.vit import window_partition, window_unpartition
from slimsam_jax.models.relative_attention import at_least_float32

__all__ = [
    "FEATURES",
    "KERNEL",
    "PRESETS",
    "ROTATES",
    "STAGES",
    "Config",
    "ImageEncoder",
    "Stage",
    "abstract_params",
    "config_of",
    "embedding_shapes",
    "features",
    "keep_logit_scale",
    "kept_elements",
    "last_arrays",
    "narrowed",
    "places",
    "uniform",
]

Features = dict[str, dict[str, jax.Array]]
Maps = dict[str, jax.Array]


class Attention(nn.Module):
    """Multi-head attention over the tokens of a window, or of the image; the queries pooled if the block pools."""

    place: Place
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, inputs]. Returns [b, h', w', D], halved if pooled, and q, k, v, heads: [b, ., ., n, d or e]."""
        b, block = len(x), self.place.block
        widths = {"q": block.key_dim, "k": block.key_dim, "v": block.value_dim}
        project = lambda name: DenseGeneral((block.heads, widths[name]), dtype=self.dtype, name=name)
        q, k, v = (project(name)(x) for name in "qkv")
        queries = self.perturb("queries", pool(q) if self.place.pools else q)
        flat = (array.reshape(b, -1, block.heads, array.shape[-1]) for array in (queries, k, v))
        heads = attend(*flat).reshape(*queries.shape[:3], block.heads, -1)
        out = DenseGeneral(self.place.dim, axis=(-2, -1), dtype=self.dtype, name="proj")(heads)
        return out, {"q": q, "k": k, "v": v, "heads": heads}


def pool(x: jax.Array) -> jax.Array:
    """The largest of each 2 x 2: [b, h, w, ...] -> [b, h/2, w/2, ...]."""
    b, h, w = x.shape[:3]
    return x.reshape(b, h // 2, 2, w // 2, 2, *x.shape[3:]).max((2, 4))


class EncoderBlock(nn.Module):
    """norm1, attention, residual; norm2, MLP, residual."""

    place: Place
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, inputs]. Returns [b, h', w', D] and the block's features (see `ImageEncoder`)."""
        place = self.place
        norm = lambda name: nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)
        dense = lambda width, name: Dense(width, dtype=self.dtype, name=name)
        y = norm("norm1")(x)
        if place.pools:  # the projection of what is normalised takes the stream's place
            x = pool(dense(place.dim, "proj")(y))
        attention = Attention(place, self.dtype, name="attn")
        # Padded after the norm: pad tokens are zero, yet take part with q, k, v equal to the biases.
        y, features = attention(window_partition(y, place.window) if place.window else y)
        middle = self.perturb("middle", x + (window_unpartition(y, x.shape[1:3]) if place.window else y))
        hidden = gelu(dense(place.block.mlp_dim, "mlp_lin1")(norm("norm2")(middle)))
        out = self.perturb("out", middle + dense(place.dim, "mlp_lin2")(hidden))
        return out, {**features, "mlp": hidden, "middle": middle, "out": out}


class ImageEncoder(nn.Module):
    """images -> (maps, features).

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters stay float32.
      remat: recompute each block in the backward pass instead of storing it.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[Maps, Features]:
        """Encodes normalised images.

        Args:
          images: [b, H, W, 3], stretched (`imaging.frames.Stretched`) and normalised by `sam.preprocess`.

        Returns:
          maps: {"embedding": [b, H/16, W/16, C], "high_res_1": [b, H/8, W/8, C/4], "high_res_0": [b, H/4, W/4, C/8]},
            float32: all that the mask decoder reads. The decoder's own 1 x 1 convolutions of the finer two, and what
            stands for the memory of a video that an image has not, are done already: once an image, not once a prompt.
          features: {"patch": {"out": [b, h, w, D]}} and, under "blocks_i",
              q, k, v [b * windows, rows, columns, n, d or e], before pooling and the 1/sqrt(d) scale;
              heads, what each head gives to proj; middle, out [b, h, w, D]: the residual stream after attention and
              MLP; mlp [b, h, w, M]: the hidden layer, after GELU.

        Flax's collection "perturbations" adds to what SAM's does: "middle", "out" and "attn/queries" of each block, the
        latter once pooled.
        """
        c = self.config
        half = KERNEL // 2
        embed = nn.Conv(c.stages[0].dim, (KERNEL,) * 2, (PATCH,) * 2, [(half,) * 2] * 2, dtype=self.dtype, name=PATCHES)
        x = embed(images)
        zeros, side, dim = nn.initializers.zeros, c.stages[0].window, c.stages[0].dim
        coarse = self.param("pos_embed", zeros, (*c.pos_grid, dim))
        within = self.param("pos_embed_window", zeros, (side, side, dim))
        x = x + positions(coarse, within, c.grids[0]).astype(self.dtype)
        features, ends = {"patch": {"out": x}}, []
        make_block = nn.remat(EncoderBlock) if self.remat else EncoderBlock
        for i, place in enumerate(places(c)):
            if place.pools:
                ends.append(x)
            x, features[f"blocks_{i}"] = make_block(place, self.dtype, name=f"blocks_{i}")(x)
        return self.pyramid([*ends, x]), features

    def pyramid(self, ends: list[jax.Array]) -> Maps:
        """The three maps of the ends of the four stages."""
        c = self.config
        dense = lambda width, name: Dense(width, dtype=self.dtype, name=name)
        wide = lambda x: x.astype(at_least_float32(x))
        levels = [dense(c.out_chans, f"neck_{COUNT - 1 - i}")(end) for i, end in enumerate(ends)]  # the last is first
        coarsest = jnp.repeat(jnp.repeat(wide(levels[3]), 2, axis=1), 2, axis=2)
        no_memory = self.param("no_mem_embed", nn.initializers.zeros, (c.out_chans,))
        finer = {f"high_res_{i}": wide(dense(c.high_res_dims[i], f"high_res_{i}")(levels[i])) for i in (0, 1)}
        return {"embedding": wide(levels[2]) + coarsest + no_memory, **finer}


PATCHES = "patch_embed_proj"


def positions(coarse: jax.Array, within: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Learnt positions [h, w, D]: coarse ones [i, j, D] resized, and those within a window [s, s, D] repeated."""
    matrices = (bicubic_matrix(*pair).toarray() for pair in zip(coarse.shape[:2], grid, strict=True))
    rows, columns = (jnp.asarray(matrix, coarse.dtype) for matrix in matrices)
    with jax.default_matmul_precision("highest"):
        resized = jnp.einsum("hi,wj,ijd->hwd", rows, columns, coarse)
    side = len(within)
    return resized + jnp.tile(within, (grid[0] // side, grid[1] // side, 1))


def embedding_shapes(config: Config) -> dict[str, tuple[int, int, int]]:
    """Of the maps of one image."""
    finer = {f"high_res_{i}": (*config.grids[i], config.high_res_dims[i]) for i in (0, 1)}
    return {"embedding": (*config.grid, config.out_chans), **finer}


def features(config: Config, features: Features) -> dict[str, dict[str, list[jax.Array]]]:
    """What stays at full width: when the streams are cut ("embedding"), when the bottlenecks are ("bottleneck")."""
    blocks = [features[f"blocks_{i}"] for i in range(config.depth)]
    inner = {"qkv": [b[name] for b in blocks for name in "qkv"], "mlp": [b["mlp"] for b in blocks]}
    stream = [features["patch"]["out"], *(b[name] for b in blocks for name in ("middle", "out"))]
    return {"embedding": inner, "bottleneck": {"stream": stream}}


FEATURES = {"embedding": ("qkv", "mlp"), "bottleneck": ("stream",)}


def _embedding(paths: Collection[str]) -> bool:
    return any(path.endswith("norm2/bias") for path in paths)  # norm1 reads the stage before where a block pools


def _bottleneck(paths: Collection[str]) -> bool:
    return any(re.search(r"(^|/)blocks_\d+/", path) for path in paths) and not _embedding(paths)


# Whether a group, by its members' paths, is cut in a stage: all four streams in one. In neither are the channels of the
# maps, nor the rows and columns of the learnt positions, which a graph finds to be groups of their own.
STAGES = {"embedding": _embedding, "bottleneck": _bottleneck}


# See `compression.projection.hiera`.
ROTATES = (
    "the first stream, v and proj, and q and k that are not pooled; the channels of the other streams are chosen by "
    "importance, hidden ones by what they explain"
)


def kept_elements(config: Config) -> int:
    """Numbers in the residual streams of an image, which the backward pass keeps."""
    return sum(config.grids[place.stage][0] * config.grids[place.stage][1] * place.dim for place in places(config))


def last_arrays(config: Config) -> list[str]:
    """Paths that are there only if all blocks are: a check that costs nothing, before anything is traced."""
    return [f"blocks_{config.depth - 1}/norm1/scale"]


def abstract_params(config: Config) -> dict[str, Any]:
    """The parameter tree as shapes, for which nothing is traced."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    dense = lambda inputs, outputs: {"kernel": shape(inputs, outputs), "bias": shape(outputs)}
    dim, side, width = config.stages[0].dim, config.stages[0].window, config.out_chans
    tree = {
        PATCHES: {"kernel": shape(KERNEL, KERNEL, 3, dim), "bias": shape(dim)},
        "pos_embed": shape(*config.pos_grid, dim),
        "pos_embed_window": shape(side, side, dim),
        "no_mem_embed": shape(width),
    }
    tree |= {f"neck_{COUNT - 1 - i}": dense(stage.dim, width) for i, stage in enumerate(config.stages)}
    tree |= {f"high_res_{i}": dense(width, outputs) for i, outputs in enumerate(config.high_res_dims)}
    return tree | {f"blocks_{i}": _abstract_block(place) for i, place in enumerate(places(config))}


def _abstract_block(place: Place) -> dict[str, Any]:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    layer = lambda *sizes, last=1: {"kernel": shape(*sizes), "bias": shape(*sizes[-last:])}
    norm = lambda dim: {"scale": shape(dim), "bias": shape(dim)}
    block, inputs, dim = place.block, place.inputs, place.dim
    widths = {"q": block.key_dim, "k": block.key_dim, "v": block.value_dim}
    attention = {name: layer(inputs, block.heads, width, last=2) for name, width in widths.items()}
    attention["proj"] = {"kernel": shape(block.heads, block.value_dim, dim), "bias": shape(dim)}
    tree = {"norm1": norm(inputs), "attn": attention, "norm2": norm(dim)}
    tree |= {"mlp_lin1": layer(dim, block.mlp_dim), "mlp_lin2": layer(block.mlp_dim, dim)}
    return tree | ({"proj": layer(inputs, dim)} if place.pools else {})
