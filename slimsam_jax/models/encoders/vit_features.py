"""What distillation reads off an image encoder: embedding and features as dicts of equal keys."""

from __future__ import annotations

from typing import Any

import jax

from slimsam_jax.models.attention import Form
from slimsam_jax.models.config import GLOBAL, Config
from slimsam_jax.models.encoders.vit import Features, ImageEncoder
from slimsam_jax.models.sam import Params, preprocess

# Above this many numbers in the residual stream (images x tokens x channels x blocks) each block is computed again in
# the backward pass instead of being kept: more than one image of ViT-B at 1024 px on a device.
REMAT_ABOVE = 2**26


def make_encoder(config: Config, images: int, dtype: Any, attention: Form = "auto") -> ImageEncoder:
    """For batches of so many images on a device."""
    stream = images * config.grid[0] * config.grid[1] * config.embed_dim * len(config.blocks)
    return ImageEncoder(config, dtype, remat=stream > REMAT_ABOVE, attention=attention)


def run_encoder(
    config: Config,
    encoder: Params,
    batch: dict[str, jax.Array],
    dtype: Any = None,
    devices: int = 1,
    attention: Form = "auto",
):
    """(embedding, features) of a batch {"image": uint8, "size"}.

    Args:
      encoder: the image encoder's parameters.
      dtype: of the computation; the parameters' if None.
      devices: that the compiler splits the batch over.
      attention: how it is computed, see `models.attention`.
    """
    pixels = preprocess(config, batch["image"], batch["size"])
    model = make_encoder(config, -(-len(pixels) // devices), dtype or encoder["pos_embed"].dtype, attention)
    return model.apply({"params": encoder}, pixels)


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
