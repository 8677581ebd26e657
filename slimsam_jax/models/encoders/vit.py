"""The ViT image encoder of SAM: images -> embedding, features.

Shapes: b images, h x w tokens, D embedding channels, n heads, d channels per head,
M MLP channels. Names follow `segment_anything`, with q, k and v apart as in SlimSAM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slimsam_jax.models.config import GLOBAL, Block, Config
from slimsam_jax.models.encoders.layers import keep_logit_scale
from slimsam_jax.models.relative_attention import Form, at_least_float32, attend

__all__ = [
    "FEATURES",
    "STAGES",
    "Config",
    "ImageEncoder",
    "abstract_params",
    "config_of",
    "features",
    "keep_logit_scale",
    "kept_elements",
    "last_arrays",
]

Features = dict[str, dict[str, jax.Array]]


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions (ViTDet)."""

    block: Block
    span: tuple[int, int]
    dtype: Any = jnp.float32
    form: Form = "auto"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, D] with (h, w) == span. Returns the same shape, and q, k, v, heads: [b, h, w, n, d]."""
        head_dim = self.block.head_dim
        project = lambda name: nn.DenseGeneral((self.block.heads, head_dim), dtype=self.dtype, name=name)
        q, k, v = (project(name)(x) for name in "qkv")
        q = self.perturb("queries", q)
        tables = (
            self.param(f"rel_pos_{axis}", nn.initializers.zeros, (2 * side - 1, head_dim)).astype(self.dtype)
            for axis, side in zip("hw", self.span, strict=True)
        )
        heads = attend(q, k, v, *tables, self.form, self.mesh)
        out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="proj")(heads)
        return out, {"q": q, "k": k, "v": v, "heads": heads}


def window_partition(x: jax.Array, window: int) -> jax.Array:
    """[b, h, w, c] -> [b * windows, window, window, c], zero-padded at the bottom and right."""
    b, h, w, c = x.shape
    rows, columns = -(-h // window), -(-w // window)
    x = jnp.pad(x, ((0, 0), (0, rows * window - h), (0, columns * window - w), (0, 0)))
    x = x.reshape(b, rows, window, columns, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b * rows * columns, window, window, c)


def window_unpartition(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Inverse of `window_partition`; drops the padding."""
    window, c = x.shape[1], x.shape[-1]
    rows, columns = (-(-side // window) for side in grid)
    x = x.reshape(-1, rows, columns, window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * window, columns * window, c)[:, : grid[0], : grid[1]]


class EncoderBlock(nn.Module):
    """norm1, attention, residual; norm2, MLP, residual."""

    block: Block
    span: tuple[int, int]
    dtype: Any = jnp.float32
    attention: Form = "auto"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, D]. Returns the same shape and the block's features (see `ImageEncoder`)."""
        norm = lambda name: nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)
        attention = Attention(self.block, self.span, self.dtype, self.attention, self.mesh, name="attn")
        y = norm("norm1")(x)
        if self.block.window == GLOBAL:
            y, features = attention(y)
        else:
            # Padded after the norm: pad tokens are zero, yet take part with q, k, v equal to the biases.
            y, features = attention(window_partition(y, self.block.window))
            y = window_unpartition(y, x.shape[1:3])
        middle = self.perturb("middle", x + y)
        y = nn.Dense(self.block.mlp_dim, dtype=self.dtype, name="mlp_lin1")(norm("norm2")(middle))
        hidden = jax.nn.gelu(y, approximate=False)
        out = self.perturb("out", middle + nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_lin2")(hidden))
        return out, {**features, "mlp": hidden, "middle": middle, "out": out}


class ImageEncoder(nn.Module):
    """images -> (embedding, features).

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters stay float32.
      remat: recompute each block in the backward pass instead of storing it.
      attention: how it is computed (`relative_attention.attend`).
      mesh: of the devices that images are split over; None for one device.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False
    attention: Form = "auto"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Features]:
        """Encodes normalised images.

        Args:
          images: [b, H, W, 3], normalised and padded by `sam.preprocess`.

        Returns:
          embedding: [b, h, w, out_chans] float32, (h, w) = config.grid.
          features: {"patch": {"out": [b, h, w, D]}} and, under "blocks_i", those of each block:
            q, k, v [b * windows, rows, columns, n, d], before the 1/sqrt(d) scale, padded window
              tokens included;
            heads, of the same shape: what each head gives to proj;
            middle, out [b, h, w, D]: the residual stream after attention and after the MLP;
            mlp [b, h, w, M]: the hidden layer, after GELU.
            Under `jit` those that nobody reads cost nothing.

        Flax's collection "perturbations" adds to the residual stream after the attention ("middle") and the MLP
        ("out") of each block, and to its q ("attn/queries"), so that gradients can be taken there.
        """
        c = self.config
        conv = lambda features, size, name, **kw: nn.Conv(features, (size, size), dtype=self.dtype, name=name, **kw)
        patch = c.patch_size
        x = conv(c.embed_dim, patch, "patch_embed_proj", strides=(patch, patch), padding="VALID")(images)
        x = x + self.param("pos_embed", nn.initializers.zeros, (1, *c.grid, c.embed_dim)).astype(self.dtype)
        features = {"patch": {"out": x}}
        make_block = nn.remat(EncoderBlock) if self.remat else EncoderBlock
        for i, block in enumerate(c.blocks):
            name = f"blocks_{i}"
            how = (self.dtype, self.attention, self.mesh)
            x, features[name] = make_block(block, c.attention_span(block), *how, name=name)(x)
        for i, size in ((0, 1), (2, 3)):
            x = conv(c.out_chans, size, f"neck_{i}", padding="SAME", use_bias=False)(x)
            x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"neck_{i + 1}")(x)
        return x.astype(at_least_float32(x)), features


def bottleneck_features(config: Config, features: Features) -> dict[str, list[jax.Array]]:
    """What pruning the embedding leaves at full width: q, k, v by kind of block, and the MLP hidden layers.

    Window and global blocks are apart because the reference weighs (and, by a slip, drops) them apart.
    Padded tokens of the windows are included, as in the reference.
    """
    blocks = [(block, features[f"blocks_{i}"]) for i, block in enumerate(config.blocks)]
    qkv = lambda wanted: [f[name] for block, f in blocks for name in "qkv" if (block.window == GLOBAL) is wanted]
    return {"qkv_window": qkv(False), "qkv_global": qkv(True), "mlp": [f["mlp"] for _, f in blocks]}


def stream_features(config: Config, features: Features) -> dict[str, list[jax.Array]]:
    """What pruning the bottlenecks leaves at full width: the residual stream.

    After patch embedding, and after the attention and the MLP of every block.
    """
    blocks = [features[f"blocks_{i}"] for i in range(len(config.blocks))]
    return {"stream": [features["patch"]["out"], *(f[name] for f in blocks for name in ("middle", "out"))]}


def features(config: Config, features: Features) -> dict[str, dict[str, list[jax.Array]]]:
    """What stays at full width: when the embedding is cut ("embedding"), when the bottlenecks are ("bottleneck")."""
    return {"embedding": bottleneck_features(config, features), "bottleneck": stream_features(config, features)}


FEATURES = {"embedding": ("qkv_window", "qkv_global", "mlp"), "bottleneck": ("stream",)}


def _embedding(paths: Collection[str]) -> bool:
    return "patch_embed_proj/bias" in paths


def _bottleneck(paths: Collection[str]) -> bool:
    return any(path.startswith("blocks_") for path in paths) and not _embedding(paths)


# Whether a group, by its members' paths, is cut in a stage; the neck's own channels are in neither.
STAGES = {"embedding": _embedding, "bottleneck": _bottleneck}


def config_of(params: Any, image_size: int | tuple[int, int] | None = None, like: Config | None = None) -> Config:
    """The architecture whose widths are those of the arrays.

    Args:
      like: of the encoder before it was cut: windows, which no shape tells, and the head stay.

    Raises:
      ValueError: without `like`.
    """
    if like is None:
        raise ValueError("a ViT's windows are told by no shape: give the architecture before the cut")
    blocks = tuple(
        dataclasses.replace(
            block,
            heads=params[f"blocks_{i}"]["attn"]["q"]["kernel"].shape[1],
            head_dim=params[f"blocks_{i}"]["attn"]["q"]["kernel"].shape[2],
            mlp_dim=params[f"blocks_{i}"]["mlp_lin1"]["kernel"].shape[1],
        )
        for i, block in enumerate(like.blocks)
    )
    return dataclasses.replace(like, embed_dim=params["pos_embed"].shape[-1], blocks=blocks)


def kept_elements(config: Config) -> int:
    """Numbers that the backward pass keeps of an image, in shares of which an uncut block has its residual stream.

    Where the stream is cut and the blocks are not, as while a bottleneck's importance is estimated, the blocks' own
    activations are the most: of ViT-H 12 GB, if they counted as little as the stream and were all kept.
    """
    wide = lambda block: max(config.embed_dim, block.mlp_dim // 4)
    return config.grid[0] * config.grid[1] * sum(map(wide, config.blocks))


def abstract_params(config: Any, module: type[nn.Module] = ImageEncoder) -> Any:
    """The parameter tree as shapes, of this or another plain ViT; equal blocks are traced once."""
    distinct = tuple(dict.fromkeys(config.blocks))
    traced = module(dataclasses.replace(config, blocks=distinct))
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    encoder = dict(jax.eval_shape(lambda images: traced.init(jax.random.key(0), images)["params"], images))
    shapes = {block: encoder.pop(f"blocks_{i}") for i, block in enumerate(distinct)}
    return encoder | {f"blocks_{i}": shapes[block] for i, block in enumerate(config.blocks)}


def last_arrays(config: Config) -> list[str]:
    """Paths that are there only if all blocks are: a check that costs nothing, before anything is traced."""
    return [f"blocks_{len(config.blocks) - 1}/norm1/scale"]
