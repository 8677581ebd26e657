"""TinyViT as MobileSAM and TinySAM use it: a convolutional stage, then stages of windowed attention.

Shapes: b images, h x w pixels or tokens of a stage, C its channels, n heads, d channels per head of q and k, e of v,
M MLP channels. Names follow `mobile_sam`, with q, k and v apart. Each stage has a residual stream of its own, with a
GELU on it in the first and a depthwise convolution per block in the others: its channels can be selected, not rotated.
Heads can: biases are added to their logits, and nothing else lies between q and k, or between v and proj.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.models.encoders.attention import attend
from slimsam_jax.models.encoders.layers import (
    ConvNorm,
    Dense,
    DenseGeneral,
    fold_batch_norm,
    gelu,
    keep_logit_scale,
    neck,
)
from slimsam_jax.models.encoders.tiny_vit_config import PRESETS, Block, Config, Stage, config_of, narrowed, uniform
from slimsam_jax.models.encoders.vit import window_partition, window_unpartition

__all__ = [
    "FEATURES",
    "PRESETS",
    "ROTATES",
    "STAGES",
    "Block",
    "Config",
    "ImageEncoder",
    "Stage",
    "config_of",
    "features",
    "fold_batch_norm",
    "for_inference",
    "keep_logit_scale",
    "keeps_unread",
    "narrowed",
    "uniform",
]

Features = dict[str, dict[str, jax.Array]]


class InvertedBottleneck(nn.Module):
    """1 x 1, GELU, depthwise 3 x 3, GELU, 1 x 1, each with batch norm: an MBConv's branch, and a downsampling."""

    hidden: int
    features: int
    conv: Any
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[b, h, w, C] -> [b, h / stride, w / stride, features], and its hidden layers, after GELU."""
        expanded = gelu(self.conv(self.hidden, name="conv1")(x))
        filtered = gelu(self.conv(self.hidden, 3, self.stride, depthwise=True, name="conv2")(expanded))
        written = self.perturb("written", self.conv(self.features, name="conv3")(filtered))
        return written, {"expanded": expanded, "filtered": filtered}


class Attention(nn.Module):
    """Multi-head attention within a window, with a bias for each distance of two tokens in rows and columns."""

    block: Block
    window: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, C] with (h, w) == window. Returns the same shape, and q, k, v, heads: [b, h, w, n, d or e]."""
        (b, h, w, width), block = x.shape, self.block
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        widths = {"q": block.key_dim, "k": block.key_dim, "v": block.value_dim}
        project = lambda name: DenseGeneral((block.heads, widths[name]), dtype=self.dtype, name=name)
        q, k, v = (project(name)(x) for name in "qkv")
        q = self.perturb("queries", q)
        table = self.param("attention_biases", nn.initializers.zeros, (block.heads, h, w))
        flat = (array.reshape(b, h * w, block.heads, -1) for array in (q, k, v))
        heads = attend(*flat, by_distance(table).astype(self.dtype)).reshape(b, h, w, block.heads, -1)
        out = DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="proj")(heads)
        return out, {"q": q, "k": k, "v": v, "heads": heads}


def by_distance(table: jax.Array) -> jax.Array:
    """[n, h, w] by distance in rows and in columns -> [n, h*w, h*w] by query and key."""
    _, h, w = table.shape
    y, x = np.divmod(np.arange(h * w), w)
    return table[:, np.abs(y[:, None] - y), np.abs(x[:, None] - x)]


class MLP(nn.Module):
    """LayerNorm and two layers with GELU between."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[b, h, w, C] -> the same, and the hidden layer [b, h, w, M], after GELU."""
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        dense = functools.partial(Dense, dtype=self.dtype)
        hidden = gelu(dense(self.hidden, name="fc1")(y))
        return dense(x.shape[-1], name="fc2")(hidden), hidden


class AttentionBlock(nn.Module):
    """Attention, residual; a depthwise convolution; MLP, residual."""

    block: Block
    window: int
    conv: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, C]. Returns the same shape and the block's features (see `ImageEncoder`)."""
        attention = Attention(self.block, (self.window, self.window), self.dtype, name="attn")
        # Padded before the norm, which the original has inside: pad tokens become its bias, and are attended to.
        y, features = attention(window_partition(x, self.window))
        middle = self.perturb("middle", x + window_unpartition(y, x.shape[1:3]))
        local = self.conv(x.shape[-1], 3, depthwise=True, name="local_conv")(middle)  # in the stream, no residual
        y, hidden = MLP(self.block.mlp_dim, self.dtype, name="mlp")(local)
        out = self.perturb("out", local + y)
        return out, {**features, "mlp": hidden, "middle": middle, "local": local, "out": out}


class ConvStage(nn.Module):
    """Blocks of inverted bottlenecks, and the downsampling to the next stage."""

    config: Config
    conv: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Features]:
        body = nn.remat(InvertedBottleneck) if self.remat else InvertedBottleneck
        features = {}
        for i, hidden in enumerate(self.config.conv_blocks):
            y, inner = body(hidden, x.shape[-1], self.conv, name=f"blocks_{i}")(x)
            x = gelu(x + y)
            features[f"blocks_{i}"] = {**inner, "out": x}
        return downsample(x, self.config.stages[0], self.conv, features)


class AttentionStage(nn.Module):
    """Blocks of attention, and the downsampling to the next stage, if there is one."""

    stage: Stage
    following: Stage | None
    conv: Any
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Features]:
        make_block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        features = {}
        for i, block in enumerate(self.stage.blocks):
            name = f"blocks_{i}"
            x, features[name] = make_block(block, self.stage.window, self.conv, self.dtype, name=name)(x)
        return downsample(x, self.following, self.conv, features) if self.following else (x, features)


def downsample(x: jax.Array, to: Stage, conv: Any, features: Features) -> tuple[jax.Array, Features]:
    """The last layers of a stage, in whose compact module it is called: to the next one's width and grid."""
    x, inner = InvertedBottleneck(to.entry_dim, to.dim, conv, to.stride, name="downsample")(x)
    return x, {**features, "downsample": {**inner, "out": x}}


class ImageEncoder(nn.Module):
    """images -> (embedding, features).

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters stay float32.
      remat: recompute each block in the backward pass instead of storing it.
      of_batch: normalise by the statistics of the batch and sow them (`layers.with_statistics`), as in training.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False
    of_batch: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Features]:
        """Encodes normalised images.

        Args:
          images: [b, H, W, 3], normalised and padded by `sam.preprocess`.

        Returns:
          embedding: [b, h, w, out_chans] float32, (h, w) = config.grid.
          features: {"patch": {"hidden", "out"}}, the channels of the patch embedding's two convolutions; and, under
            "layers_i/blocks_j" and "layers_i/downsample", of the convolutional stage and of downsamplings
              expanded, filtered: the hidden layers, after GELU; out: the residual stream;
            of attention
              q, k, v [b * windows, rows, columns, n, d or e], before the 1/sqrt(d) scale, padded tokens included;
              heads, of v's shape: what each head gives to proj;
              middle, local, out [b, h, w, C]: the residual stream after attention, convolution and MLP;
              mlp [b, h, w, M]: the hidden layer, after GELU.
            Under `jit` those that nobody reads cost nothing.
        Flax's collection "perturbations" adds to the residual streams after attention ("middle") and MLPs ("out"), to
        queries ("attn/queries"), and to what the last convolution of the patch embedding ("patch"), of a convolutional
        block and of a downsampling ("written") gives; of its gradient the disturbed loss is made.
        """
        c = self.config
        conv = functools.partial(ConvNorm, batch_norm=c.batch_norm, of_batch=self.of_batch, dtype=self.dtype)
        hidden = gelu(conv(c.stem_dim, 3, 2, name="patch_embed_0")(images))
        x = self.perturb("patch", conv(c.conv_dim, 3, 2, name="patch_embed_2")(hidden))
        features = {"patch": {"hidden": hidden, "out": x}}
        x, inner = ConvStage(c, conv, self.remat, name="layers_0")(x)
        features |= {f"layers_0/{name}": value for name, value in inner.items()}
        for i, (stage, following) in enumerate(zip(c.stages, (*c.stages[1:], None), strict=True), start=1):
            x, inner = AttentionStage(stage, following, conv, self.dtype, self.remat, name=f"layers_{i}")(x)
            features |= {f"layers_{i}/{name}": value for name, value in inner.items()}
        return neck(x, c.out_chans, self.dtype), features


def features(config: Config, features: Features) -> dict[str, dict[str, list[jax.Array]]]:
    """What stays at full width: when the embedding is cut ("embedding"), when the bottlenecks are ("bottleneck").

    As the reference does for SAM, after activations, and padded tokens of the windows included.
    """
    all_of = lambda *names: [part[name] for part in features.values() for name in names if name in part]
    inner = {
        "stem": [features["patch"]["hidden"]],
        "conv": all_of("expanded", "filtered"),
        "qkv": all_of("q", "k", "v"),
        "mlp": all_of("mlp"),
    }
    return {"embedding": inner, "bottleneck": {"stream": all_of("middle", "local", "out")}}


def for_inference(config: Config, params: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The same encoder without batch norms, which are multiplied into convolutions."""
    if not config.batch_norm:
        return config, params
    return dataclasses.replace(config, batch_norm=False), fold_batch_norm(params)


def keeps_unread(config: Config, before: Config) -> bool:
    """Whether what published files have besides (`Sam.kept`) fits after a cut: the classifier is of the last stage."""
    return config.stages[-1].dim == before.stages[-1].dim


FEATURES = {"embedding": ("stem", "conv", "qkv", "mlp"), "bottleneck": ("stream",)}

# Vectors on a residual stream, in a tree with batch norms and in a folded one.
_STREAM = re.compile(r"(^|/)(patch_embed_2|conv3|norm)(/bn)?/bias$")


def _embedding(paths: Collection[str]) -> bool:
    return any(map(_STREAM.search, paths))


def _bottleneck(paths: Collection[str]) -> bool:
    return not _embedding(paths) and not any(path.endswith("neck_1/bias") for path in paths)


# Whether a group, by its members' paths, is cut in a stage: all four streams in one, and the neck's width in neither.
STAGES = {"embedding": _embedding, "bottleneck": _bottleneck}

# See `compression.projection.tiny_vit`.
ROTATES = "q, k, v and proj of heads; streams' channels are chosen by importance, hidden ones by what they explain"
