"""What distillation reads off an image encoder: embedding and features as dicts of equal keys."""

from __future__ import annotations

from typing import Any

import jax

from slimsam_jax.models.config import GLOBAL, Config
from slimsam_jax.models.image_encoder import Features, ImageEncoder
from slimsam_jax.models.sam import Params, preprocess

# A block's activations at 64 x 64 tokens do not fit beside each other: recompute them in the backward pass.
REMAT_TOKENS = 1024


def make_encoder(config: Config, dtype: Any) -> ImageEncoder:
    return ImageEncoder(config, dtype, remat=config.grid[0] * config.grid[1] >= REMAT_TOKENS)


def run_encoder(config: Config, encoder: Params, batch: dict[str, jax.Array], dtype: Any = None):
    """(embedding, features) of a batch {"image": uint8, "size"}.

    Args:
      encoder: the image encoder's parameters.
      dtype: of the computation; the parameters' if None.
    """
    pixels = preprocess(config, batch["image"], batch["size"])
    return make_encoder(config, dtype or encoder["pos_embed"].dtype).apply({"params": encoder}, pixels)


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
