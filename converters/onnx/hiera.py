"""Builds Hiera with its feature pyramid as an ONNX graph: what `models.encoders.hiera` computes, of any widths.

Shapes: b images, h x w tokens of a stage, D its channels, n heads, d channels per head of q and k, L tokens of
a window.
"""

from __future__ import annotations

import numpy as np

from converters.onnx.encoder import by_heads, window_partition, window_unpartition
from converters.onnx.graph import CUBIC, Graph
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.encoders.hiera_config import KERNEL, PATCH, Config, Place, places

ROOT = "image_encoder"
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def image_encoder(g: Graph, config: SamConfig, pixels: str) -> dict[str, str]:
    """Encodes [b, 3, H, W] normalised images into the maps of `hiera.ImageEncoder`, channels first."""
    c = config.encoder
    fold(g)
    x = g.conv(g.half(g.transpose(pixels, 0, 2, 3, 1)), f"{ROOT}/patch_embed_proj", stride=PATCH, pad=KERNEL // 2)
    x, ends = g.add(g.wide(x), positions(g, c)), []
    for i, place in enumerate(places(c)):
        if place.pools:
            ends.append(x)
        x = encoder_block(g, place, x, f"{ROOT}/blocks_{i}")
    return pyramid(g, [*ends, x])


def fold(g: Graph) -> None:
    """Folds what stands for a video's memory into a bias, and a finer map's two 1 x 1 convolutions into one.

    The latter unless they are integers: their product is none.
    """
    g.params[f"{ROOT}/neck_1/bias"] = g.params[f"{ROOT}/neck_1/bias"] + g.params[f"{ROOT}/no_mem_embed"]
    for i, (first, second) in enumerate(finer()):
        if f"{first}/kernel" in g.integers or f"{second}/kernel" in g.integers:
            continue
        kernel, bias, last = (
            g.params[path].astype(np.float64) for path in (f"{first}/kernel", f"{first}/bias", f"{second}/kernel")
        )
        g.params[f"{ROOT}/folded_{i}/kernel"] = kernel @ last
        g.params[f"{ROOT}/folded_{i}/bias"] = bias @ last + g.params[f"{second}/bias"]


def finer() -> list[tuple[str, str]]:
    """The convolutions of the finer maps, of the neck and the decoder's own."""
    return [(f"{ROOT}/neck_{3 - i}", f"{ROOT}/high_res_{i}") for i in (0, 1)]


def positions(g: Graph, config: Config) -> str:
    """Learnt positions, the coarse ones bicubic and those within a window repeated: [1, h, w, D].

    In the graph, where they take less room.
    """
    (h, w), dim, side = config.grids[0], config.stages[0].dim, config.stages[0].window
    coarse = g.transpose(g.param(f"{ROOT}/pos_embed", shape=(1, *config.pos_grid, dim)), 0, 3, 1, 2)
    coarse = g.transpose(g.op("Resize", coarse, "", "", np.array([1, dim, h, w]), **CUBIC), 0, 2, 3, 1)
    within = g.param(f"{ROOT}/pos_embed_window", shape=(1, side, side, dim))
    return g.add(coarse, g.op("Tile", within, (1, h // side, w // side, 1)))


def encoder_block(g: Graph, place: Place, x: str, path: str) -> str:
    """Attention, residual; MLP, residual. x: [b, h, w, inputs] float32 -> [b, h', w', D], halved if the block pools."""
    y = g.half(g.layer_norm(x, f"{path}/norm1"))
    if place.pools:
        x = pooled(g, g.wide(g.linear(y, f"{path}/proj")))
    stride, side = 1 + place.pools, place.window
    if side:
        y = window_partition(g, y, side, place.grid, place.inputs)
    y = g.wide(attention(g, place, (side, side) if side else place.grid, y, f"{path}/attn"))
    if side:
        y = window_unpartition(g, y, side // stride, tuple(length // stride for length in place.grid), place.dim)
    x = g.add(x, y)
    y = g.gelu(g.linear(g.half(g.layer_norm(x, f"{path}/norm2")), f"{path}/mlp_lin1"))
    return g.add(x, g.wide(g.linear(y, f"{path}/mlp_lin2")))


def attention(g: Graph, place: Place, span: tuple[int, int], x: str, path: str) -> str:
    """Attends within x, [b, h, w, inputs] with (h, w) == span, queries pooled if the block pools: [b, h', w', D]."""
    block, tokens = place.block, span[0] * span[1]
    split = lambda y, width: g.reshape(y, -1, tokens, block.heads, width)
    q, queries = g.linear(x, f"{path}/q"), span
    if place.pools:
        q, queries = g.half(pooled(g, g.wide(q))), (span[0] // 2, span[1] // 2)
    q = g.transpose(g.reshape(q, -1, queries[0] * queries[1], block.heads, block.key_dim), 0, 2, 1, 3)
    k = g.transpose(split(g.linear(x, f"{path}/k"), block.key_dim), 0, 2, 3, 1)  # [b, n, d, L]
    v = g.transpose(split(g.linear(x, f"{path}/v"), block.value_dim), 0, 2, 1, 3)
    attend = lambda q, k, v: g.op("MatMul", g.softmax(g.op("MatMul", q, k)), v)
    out = by_heads(g, block.heads, tokens, g.mul(q, block.key_dim**-0.5), k, v, attend)
    out = g.reshape(g.transpose(out, 0, 2, 1, 3), -1, *queries, block.heads * block.value_dim)
    return g.linear(out, f"{path}/proj")


def pooled(g: Graph, x: str) -> str:
    """The largest of each 2 x 2, [b, h, w, c] float32; onnxruntime has no such kernel in half precision."""
    x = g.op("MaxPool", g.transpose(x, 0, 3, 1, 2), kernel_shape=[2, 2], strides=[2, 2])
    return g.transpose(x, 0, 2, 3, 1)


def pyramid(g: Graph, ends: list[str]) -> dict[str, str]:
    """The three maps of the ends of the four stages, channels first."""
    level = lambda x, path: g.wide(g.linear(g.half(x), path))
    first = lambda x: g.transpose(x, 0, 3, 1, 2)
    coarsest = g.op("Resize", first(level(ends[3], f"{ROOT}/neck_0")), "", np.float32([1, 1, 2, 2]), **NEAREST)
    maps = {"embedding": g.add(first(level(ends[2], f"{ROOT}/neck_1")), coarsest)}
    for i, paths in enumerate(finer()):
        x = ends[i]
        for path in (f"{ROOT}/folded_{i}",) if f"{ROOT}/folded_{i}/kernel" in g.params else paths:
            x = level(x, path)
        maps[f"high_res_{i}"] = first(x)
    return maps
