"""RepViT as EdgeSAM uses it: a convolutional encoder of four stages, whose last two are joined.

Written from facts alone: a description of EdgeSAM in others' words, names and shapes of its arrays, and arrays that its
code has computed. Who wrote this has not read that code, whose licence (S-Lab 1.0) allows non-commercial use only. The
same holds for the weights that EdgeSAM's authors publish, and loading them here does not change it. RepViT itself
(THU-MIG/RepViT) is Apache-2.0.

Shapes: b images, h x w pixels of a stage, C its channels. In training a block's depthwise filter is the sum of two
branches with batch norm and the input itself; `fold_batch_norm` makes one convolution of the three. A stage's channels
are filtered one by one and gated one by one: they can be selected, not rotated.
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

from slimsam_jax.imaging.bicubic import bicubic_matrix
from slimsam_jax.imaging.transforms import bilinear_matrix
from slimsam_jax.models.encoders import layers
from slimsam_jax.models.encoders.layers import ConvNorm, neck
from slimsam_jax.models.encoders.rep_vit_branches import fold_batch_norm, unfold_batch_norm
from slimsam_jax.models.encoders.rep_vit_config import (
    PRESETS,
    Block,
    Config,
    Stage,
    config_of,
    squeezed_dim,
    uniform,
)

__all__ = [
    "FEATURES",
    "PRESETS",
    "RANKED_BY_STABILITY",
    "STAGES",
    "Block",
    "Config",
    "ImageEncoder",
    "Stage",
    "config_of",
    "features",
    "fold_batch_norm",
    "for_inference",
    "kept_elements",
    "squeezed_dim",
    "unfold_batch_norm",
    "uniform",
]

Features = dict[str, dict[str, jax.Array]]


class SqueezeExcite(nn.Module):
    """Gates each channel by what two layers make of all channels' means."""

    squeezed: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, C] -> the same."""
        means = x.mean((1, 2))
        hidden = jax.nn.relu(nn.Dense(self.squeezed, dtype=self.dtype, name="fc1")(means))
        gates = jax.nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden))
        return x * gates[:, None, None, :]


class MixerBlock(nn.Module):
    """Mixes tokens by a depthwise filter, then channels by an MLP with a residual.

    Attributes:
      dim: channels of its output.
      strided: halves rows and columns, and takes another width to `dim`.
      branches: whether the filter is three, as in training; see `fold_batch_norm`.
      conv: `ConvNorm` with what all of an encoder's have in common.
      gelu: the activation.
    """

    block: Block
    dim: int
    strided: bool
    branches: bool
    conv: Any
    gelu: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[b, h, w, C] -> [b, h, w, dim] (halved if strided), and {"middle", "hidden", "out"}."""
        middle = self.mixed_tokens(x)
        hidden = self.gelu(self.conv(self.block.hidden, name="mixer_0")(middle))
        out = middle + self.conv(self.dim, name="mixer_2")(hidden)
        return out, {"middle": middle, "hidden": hidden, "out": out}

    def mixed_tokens(self, x: jax.Array) -> jax.Array:
        """The depthwise filter, squeeze-excite and, if strided, the change of width. No activation in between."""
        width = x.shape[-1]
        y = self.conv(width, 3, 2 if self.strided else 1, depthwise=True, name="conv")(x)
        if self.branches and not self.strided:
            y = y + self.conv(width, 1, depthwise=True, name="conv1")(x) + x
        if self.block.squeezed:
            y = SqueezeExcite(self.block.squeezed, self.dtype, name="squeeze")(y)
        return self.conv(self.dim, name="project")(y) if self.strided else y


class MixerStage(nn.Module):
    """The blocks of a stage."""

    stage: Stage
    strided: bool
    branches: bool
    conv: Any
    gelu: Any
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Features]:
        make = nn.remat(MixerBlock) if self.remat else MixerBlock
        features = {}
        for i, block in enumerate(self.stage.blocks):
            options = (self.stage.dim, self.strided and i == 0, self.branches, self.conv, self.gelu, self.dtype)
            x, features[f"blocks_{i}"] = make(block, *options, name=f"blocks_{i}")(x)
        return x, features


class ImageEncoder(nn.Module):
    """images -> (embedding, features).

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters stay float32.
      remat: recompute each block in the backward pass instead of storing it.
      of_batch: normalise by the statistics of the batch and sow them (`layers.with_statistics`), as in training.
      bilinear, tanh_gelu: as EdgeSAM's exported graphs may compute, which differ from its weights' own numbers.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False
    of_batch: bool = False
    bilinear: bool = False
    tanh_gelu: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Features]:
        """Encodes normalised images.

        Args:
          images: [b, H, W, 3], normalised and padded by `sam.preprocess`.

        Returns:
          embedding: [b, h, w, out_chans] float32, (h, w) = config.grid.
          features: {"stem": {"hidden", "out"}}, the channels of the stem's two convolutions; and under
            "stages_i/blocks_j" middle, out: the residual stream behind the mixing of tokens and of channels; hidden:
            the channel mixer's hidden layer, after GELU.
        """
        c, gelu = self.config, jax.nn.gelu if self.tanh_gelu else layers.gelu
        conv = functools.partial(ConvNorm, batch_norm=c.batch_norm, of_batch=self.of_batch, dtype=self.dtype)
        hidden = gelu(conv(c.stem_dim, 3, 2, name="stem_0")(images))
        x = conv(c.stages[0].dim, 3, 2, name="stem_2")(hidden)
        features, ends = {"stem": {"hidden": hidden, "out": x}}, []
        for i, stage in enumerate(c.stages):
            options = (i > 0, c.batch_norm, conv, gelu, self.dtype, self.remat)
            x, inner = MixerStage(stage, *options, name=f"stages_{i}")(x)
            features |= {f"stages_{i}/{name}": value for name, value in inner.items()}
            ends.append(x)
        fuse = lambda name: layers.Dense(c.fuse_dim, use_bias=False, dtype=self.dtype, name=name)
        joined = fuse("fuse_2")(ends[2]) + doubled(fuse("fuse_3")(ends[3]), self.bilinear)
        return neck(joined, c.out_chans, self.dtype), features


def doubled(x: jax.Array, bilinear: bool = False) -> jax.Array:
    """Twice the rows and columns, as PyTorch's interpolation by default: [b, h, w, c] -> [b, 2h, 2w, c]."""
    matrix = bilinear_matrix if bilinear else bicubic_matrix
    rows, columns = (jnp.asarray(matrix(side, 2 * side).toarray(), x.dtype) for side in x.shape[1:3])
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("ph,qw,bhwc->bpqc", rows, columns, x)


def features(config: Config, features: Features) -> dict[str, dict[str, list[jax.Array]]]:
    """What stays at full width: when the embedding is cut ("embedding"), when the bottlenecks are ("bottleneck")."""
    blocks = [part for name, part in features.items() if name != "stem"]
    inner = {"stem": [features["stem"]["hidden"]], "mlp": [block["hidden"] for block in blocks]}
    return {"embedding": inner, "bottleneck": {"stream": [b[name] for b in blocks for name in ("middle", "out")]}}


def for_inference(config: Config, params: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The same encoder without batch norms and branches, of which convolutions are made."""
    if not config.batch_norm:
        return config, params
    return dataclasses.replace(config, batch_norm=False), fold_batch_norm(params)


FEATURES = {"embedding": ("stem", "mlp"), "bottleneck": ("stream",)}

# A vector on a stage's stream, in a tree with batch norms and in a folded one.
_STREAM = re.compile(r"(^|/)mixer_2(/bn)?/bias$")


def _embedding(paths: Collection[str]) -> bool:
    return any(map(_STREAM.search, paths))


def _bottleneck(paths: Collection[str]) -> bool:
    return not _embedding(paths) and not any(path.endswith("neck_1/bias") for path in paths)


# EdgeSAM's training leaves out the estimate of masks' IoU: see `inference.ranking`.
RANKED_BY_STABILITY = True

# Whether a group, by its members' paths, is cut in a stage: all four streams in one, and the neck's width in neither.
STAGES = {"embedding": _embedding, "bottleneck": _bottleneck}


def kept_elements(config: Config) -> int:
    """Numbers in the residual streams of an image, which the backward pass keeps."""
    widths = (2 * stage.dim * len(stage.blocks) for stage in config.stages)
    return sum(rows * columns * width for (rows, columns), width in zip(config.grids, widths, strict=True))
