"""What TinyViT's bases are chosen from: `statistics`, with streams that convolutions read, and their hidden layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slimsam_jax.compression.projection.statistics import (
    Batch,
    Moments,
    Part,
    Statistic,
    across,
    attention_moments,
    gram,
    mlp_moments,
    normalised,
    pulled_back,
    variance_of,
)
from slimsam_jax.models.encoders.tiny_vit import Features
from slimsam_jax.models.encoders.tiny_vit_config import Block, Config, Stage
from slimsam_jax.models.encoders.vit import window_partition
from slimsam_jax.models.sam import Architecture, Params, run_encoder

PATCHES = "patch_embed"  # stands for the patch embedding among the paths of hidden layers


def blocks_of(config: Config) -> list[tuple[str, Stage, Block]]:
    """The blocks of attention in their order, each with its path."""
    numbered = [(i, stage, j) for i, stage in enumerate(config.stages, 1) for j in range(len(stage.blocks))]
    return [(f"layers_{i}/blocks_{j}", stage, stage.blocks[j]) for i, stage, j in numbered]


def convolutions_of(config: Config) -> list[str]:
    """Paths of what has a hidden layer of convolutions, in their order."""
    inner = [f"layers_0/blocks_{j}" for j in range(len(config.conv_blocks))]
    return [PATCHES, *inner, *(f"layers_{i}/downsample" for i in range(len(config.stages)))]


class Reader(NamedTuple):
    """What reads a stream.

    Attributes:
      path: of the module that its layers are in; "" of the encoder itself.
      stream: whose, by the stage; the convolutional is 0.
      layers: linear layers and convolutions 1 x 1.
      norm: whether a LayerNorm lies before them.
    """

    path: str
    stream: int
    layers: tuple[str, ...]
    norm: bool = False


def readers_of(config: Config) -> list[Reader]:
    """All that read streams; depthwise convolutions apart, which a selection leaves as they are."""
    readers = [Reader(f"layers_0/blocks_{j}", 0, ("conv1",)) for j in range(len(config.conv_blocks))]
    for i, stage in enumerate(config.stages, 1):
        readers.append(Reader(f"layers_{i - 1}/downsample", i - 1, ("conv1",)))
        for j in range(len(stage.blocks)):
            readers.append(Reader(f"layers_{i}/blocks_{j}/attn", i, ("q", "k", "v"), norm=True))
            readers.append(Reader(f"layers_{i}/blocks_{j}/mlp", i, ("fc1",), norm=True))
    return [*readers, Reader("", len(config.stages), ("neck_0",))]


def moments_of(config: Architecture, parts: Sequence[Part]) -> Statistic:
    """The statistic that gives {part: moments} of the parts asked for.

    Parts: as those of `statistics.moments_of`, in which errors and gains are shares: of a stream's variance ("blocks",
    of a token), and of the embedding's. "mlp" and what is of its places are of the blocks of attention, then of
    `convolutions_of`. But
      stream: {path of each of `readers_of`: see `statistics.across`}, of what it reads, behind the norm's scaling, x,
        and of what "changes" in the encoder's tree, [d, D] of each stage, leave of it. Before attention with the
        padding of windows, which passes the norm.
    """

    def statistic(encoder: Params, batch: Batch, keys: jax.Array) -> dict[str, Any]:
        encoder, changes = dict(encoder), encoder.get("changes")
        encoder.pop("changes", None)
        embedding, features = run_encoder(config, encoder, batch)
        own = config.encoder
        hidden = [features[path] for path, *_ in blocks_of(own)] + [_hidden(features, p) for p in convolutions_of(own)]
        found: dict[str, Any] = {
            "tokens": jnp.array(float(len(keys))),
            "embedding": jnp.square(embedding - embedding.mean()).sum(),
            "blocks": [variance_of(part["out"]) / math.prod(part["out"].shape[1:3]) for part in hidden],
        }
        if "stream" in parts:
            found["stream"] = {reader.path: _across(own, features, reader, changes) for reader in readers_of(own)}
        if "attention" in parts:
            found["attention"] = [_attention(own, features, path) for path, *_ in blocks_of(own)]
        if "mlp" in parts:
            found["mlp"] = [mlp_moments(part) for part in hidden]
        if "sensitivity" in parts:
            found["sensitivity"] = _sensitivity(config, encoder, batch, keys)
        return found

    return statistic


def _hidden(features: Features, path: str) -> dict[str, jax.Array]:
    """The hidden layer of convolutions, called as that of an MLP."""
    if path == PATCHES:
        return {"mlp": features["patch"]["hidden"], "out": features["patch"]["out"]}
    return {"mlp": features[path]["filtered"], "out": features[path]["out"]}


def _across(config: Config, features: Features, reader: Reader, changes: Sequence[jax.Array]) -> Moments:
    layer, _, inner = reader.path.partition("/")
    block, _, kind = inner.partition("/")
    if kind == "mlp":
        x = features[f"{layer}/{block}"]["local"]
    else:
        number = int(block.removeprefix("blocks_")) if block.startswith("blocks_") else None
        x = _before(config, features, reader.stream, number)
    if kind == "attn":
        x = window_partition(x, config.stages[reader.stream - 1].window)
    scaled = normalised if reader.norm else (lambda x: x)
    return across(scaled(x @ changes[reader.stream].T), scaled(x))


def _before(config: Config, features: Features, stream: int, block: int | None) -> jax.Array:
    """A stream before a block, or at its end."""
    depth = len(config.conv_blocks if stream == 0 else config.stages[stream - 1].blocks)
    block = depth if block is None else block
    if block:
        return features[f"layers_{stream}/blocks_{block - 1}"]["out"]
    return features[f"layers_{stream - 1}/downsample" if stream else "patch"]["out"]


def _attention(config: Config, features: Features, path: str) -> Moments:
    stage = int(path.split("/")[0].removeprefix("layers_"))
    real = window_partition(jnp.ones((1, *config.grids[stage], 1)), config.stages[stage - 1].window)
    return attention_moments(features[path], real[..., None])


def _sensitivity(config: Architecture, encoder: Params, batch: Batch, keys: jax.Array) -> dict[str, Any]:
    """As `statistics._sensitivity`; what convolutions write stands under "out", after the blocks."""
    noise = lambda x: jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    grads, own = pulled_back(config, encoder, batch, noise), config.encoder
    of = lambda path: grads[path.split("/")[0]][path.split("/")[1]]
    blocks = [(of(path), block.heads) for path, _, block in blocks_of(own)]
    written = [grads["patch"] if path == PATCHES else of(path)["written"] for path in convolutions_of(own)]
    return {
        "middle": [gram(block["middle"]) for block, _ in blocks],
        "out": [*(gram(block["out"]) for block, _ in blocks), *map(gram, written)],
        "queries": [gram(block["attn"]["queries"]) / heads for block, heads in blocks],
    }
