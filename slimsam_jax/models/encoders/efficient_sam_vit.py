"""EfficientSAM's ViT: plain blocks, each token attending to all, and learnt positions resized to the grid.

Shapes: b images, h x w tokens, D embedding channels, n heads, d channels per head of q and k, e of v, M MLP channels.
Names follow SAM's encoder. Only linear maps and LayerNorms lie on the residual stream, and no
norm follows the last block, so a basis change before a cut is exact, as in SAM's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.imaging.bicubic import bicubic_matrix
from slimsam_jax.models.config import DEEPEST
from slimsam_jax.models.encoders import vit
from slimsam_jax.models.encoders.architecture import AsJson, Block, block_of, check_image_size, check_widths, pair
from slimsam_jax.models.encoders.attention import attend
from slimsam_jax.models.encoders.layers import Dense, DenseGeneral, gelu, keep_logit_scale, neck
from slimsam_jax.models.encoders.vit import kept_elements, last_arrays

__all__ = [
    "FEATURES",
    "LEAVES_OUT",
    "ROTATES",
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


@dataclasses.dataclass(frozen=True)
class Config(AsJson):
    """The image encoder. Pruning changes `embed_dim` and the widths in `blocks`, nothing else.

    Attributes:
      image_size: (height, width) of the model frame in pixels, multiples of `patch_size`.
      embed_dim: width D of the residual stream.
      blocks: widths of each block.
      patch_size: side of a patch in pixels.
      pretrain_grid: rows, and columns, of the learnt positions, which are resized to `grid`.
      out_chans: channels of the image embedding.

    Raises:
      ValueError: a size out of range.
    """

    image_size: tuple[int, int]
    embed_dim: int
    blocks: tuple[Block, ...]
    patch_size: int = 16
    pretrain_grid: int = 14
    out_chans: int = 256

    def __post_init__(self):
        check_widths(self, ("embed_dim", "patch_size", "pretrain_grid", "out_chans"))
        if not 1 <= len(self.blocks) <= DEEPEST:
            raise ValueError(f"{len(self.blocks)} blocks, and 1 to {DEEPEST} are taken")
        check_image_size(self.image_size, self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens, which is also the size of the embedding."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def uniform(embed_dim: int, depth: int, heads: int, mlp_ratio: float = 4.0, image_size: Any = 1024) -> Config:
    """An architecture by the arguments of the original's class."""
    block = Block(heads, embed_dim // heads, embed_dim // heads, int(embed_dim * mlp_ratio))
    return Config(pair(image_size), embed_dim, (block,) * depth)


# efficient_sam/build_efficient_sam.py
PRESETS = {"efficient_sam_ti": uniform(192, 12, 3), "efficient_sam_s": uniform(384, 12, 6)}


def config_of(
    params: Mapping[str, Any], image_size: int | tuple[int, int] = 1024, like: Config | None = None
) -> Config:
    """Reads the architecture off the shapes of a parameter tree.

    Args:
      params: of an `ImageEncoder`, arrays or shapes.
      image_size: pixels, one side or (height, width), which no shape tells: positions are resized to it.
      like: another architecture that has it.

    Raises:
      ValueError: the tree lacks an array, or its image size fits none.
    """
    image_size = image_size if like is None else like.image_size
    try:
        patch, _, _, embed_dim = params["patch_embed_proj"]["kernel"].shape
        blocks = [params[f"blocks_{i}"] for i in range(sum(name.startswith("blocks_") for name in params))]
        return Config(
            image_size=pair(image_size),
            embed_dim=embed_dim,
            blocks=tuple(block_of(b["attn"], b["mlp_lin1"]["kernel"].shape[1]) for b in blocks),
            patch_size=patch,
            pretrain_grid=math.isqrt(params["pos_embed"].shape[0] - 1),
            out_chans=params["neck_0"]["kernel"].shape[-1],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the parameters of EfficientSAM's encoder: {error}") from None


class Attention(nn.Module):
    """Multi-head attention over all tokens, without positions."""

    block: Block
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, D]. Returns the same shape, and q, k, v, heads: [b, h, w, n, d or e]."""
        (b, h, w, width), block = x.shape, self.block
        widths = {"q": block.key_dim, "k": block.key_dim, "v": block.value_dim}
        project = lambda name: DenseGeneral((block.heads, widths[name]), dtype=self.dtype, name=name)
        q, k, v = (project(name)(x) for name in "qkv")
        q = self.perturb("queries", q)
        heads = attend(*(array.reshape(b, h * w, block.heads, -1) for array in (q, k, v)))
        heads = heads.reshape(b, h, w, block.heads, -1)
        out = DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="proj")(heads)
        return out, {"q": q, "k": k, "v": v, "heads": heads}


class EncoderBlock(nn.Module):
    """norm1, attention, residual; norm2, MLP, residual."""

    block: Block
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: [b, h, w, D]. Returns the same shape and the block's features (see `ImageEncoder`)."""
        norm = lambda name: nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)
        y, features = Attention(self.block, self.dtype, name="attn")(norm("norm1")(x))
        middle = self.perturb("middle", x + y)
        hidden = gelu(Dense(self.block.mlp_dim, dtype=self.dtype, name="mlp_lin1")(norm("norm2")(middle)))
        out = self.perturb("out", middle + Dense(x.shape[-1], dtype=self.dtype, name="mlp_lin2")(hidden))
        return out, {**features, "mlp": hidden, "middle": middle, "out": out}


class ImageEncoder(nn.Module):
    """images -> (embedding, features).

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters stay float32.
      remat: recompute each block in the backward pass instead of storing it.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, kept: jax.Array | None = None) -> tuple[jax.Array, Features]:
        """Encodes normalised images.

        Args:
          images: [b, H, W, 3], squashed (`imaging.frames.Squashed`) and normalised by `sam.preprocess`.
          kept: [b, k] indices of the patches to see, row by row; the others go into nothing. Then tokens [b, k, D] come
            in the embedding's place, and features have a grid of [1, k].

        Returns:
          embedding: [b, h, w, out_chans] float32, (h, w) = config.grid.
          features: {"patch": {"out": [b, h, w, D]}} and, under "blocks_i", those of each block, as SAM's encoder has
            them: q, k, v before the 1/sqrt(d) scale, heads, middle, mlp after GELU, out.

        Flax's collection "perturbations" adds to what SAM's does: "middle", "out" and "attn/queries" of each block.
        """
        c, patch = self.config, self.config.patch_size
        embed = nn.Conv(c.embed_dim, (patch, patch), (patch, patch), "VALID", dtype=self.dtype, name="patch_embed_proj")
        # Row 0 is a class token's, which the original drops.
        table = self.param("pos_embed", nn.initializers.zeros, (1 + c.pretrain_grid**2, c.embed_dim))
        x = embed(images) + resized(table[1:], c.pretrain_grid, c.grid).astype(self.dtype)
        if kept is not None:
            x = jnp.take_along_axis(x.reshape(len(x), 1, -1, c.embed_dim), kept[:, None, :, None], axis=2)
        features = {"patch": {"out": x}}
        make_block = nn.remat(EncoderBlock) if self.remat else EncoderBlock
        for i, block in enumerate(c.blocks):
            x, features[f"blocks_{i}"] = make_block(block, self.dtype, name=f"blocks_{i}")(x)
        return (neck(x, c.out_chans, self.dtype) if kept is None else x[:, 0]), features


def resized(table: jax.Array, side: int, grid: tuple[int, int]) -> jax.Array:
    """Positions [side*side, D] -> [h, w, D], bicubic."""
    rows, columns = (jnp.asarray(bicubic_matrix(side, length).toarray(), table.dtype) for length in grid)
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("hi,wj,ijd->hwd", rows, columns, table.reshape(side, side, -1))


def features(config: Config, features: Features) -> dict[str, dict[str, list[jax.Array]]]:
    """What stays at full width: when the embedding is cut ("embedding"), when the bottlenecks are ("bottleneck")."""
    blocks = [features[f"blocks_{i}"] for i in range(len(config.blocks))]
    inner = {"qkv": [b[name] for b in blocks for name in "qkv"], "mlp": [b["mlp"] for b in blocks]}
    stream = [features["patch"]["out"], *(b[name] for b in blocks for name in ("middle", "out"))]
    return {"embedding": inner, "bottleneck": {"stream": stream}}


def _embedding(paths: Collection[str]) -> bool:
    return any(path.endswith("norm1/bias") for path in paths)


def _bottleneck(paths: Collection[str]) -> bool:
    return any(re.search(r"(^|/)blocks_\d+/", path) for path in paths) and not _embedding(paths)


FEATURES = {"embedding": ("qkv", "mlp"), "bottleneck": ("stream",)}

# Whether a group, by its members' paths, is cut in a stage. In neither are the neck's width, nor the rows and columns
# of the learnt positions, which a graph finds to be groups of their own.
STAGES = {"embedding": _embedding, "bottleneck": _bottleneck}
LEAVES_OUT = True  # an encoder may see some of the patches alone, as `compression.pretrain` wants it
# Nothing but linear maps and LayerNorms reads its stream: see `compression.projection.plain_vit`.
ROTATES = "the stream, and q, k, v and proj of heads; hidden channels are chosen by what they explain"


def abstract_params(config: Config) -> Any:
    """The parameter tree as shapes."""
    return vit.abstract_params(config, ImageEncoder)
