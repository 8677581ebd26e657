"""Builds the image encoder as an ONNX graph: what `models.encoders.vit` computes, of any widths per block.

Shapes: b images, h x w tokens, D embedding channels, n heads, d channels per head, L tokens of a window or an image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from converters.onnx.graph import Graph
from slimsam_jax.models.config import GLOBAL, Block, Config

# Where all heads of an image have more logits, one head follows the other. At 64 x 64 tokens and 12 heads that takes
# 0.8 GB instead of 3.8, and no more time; a browser's WebAssembly has 4.
LOGITS_AT_ONCE = 2**22


def image_encoder(g: Graph, config: Config, pixels: str) -> str:
    """Encodes [b, 3, H, W] normalised images -> [b, C, h, w]."""
    root, patch = "image_encoder", config.patch_size
    x = g.conv(g.half(g.transpose(pixels, 0, 2, 3, 1)), f"{root}/patch_embed_proj", stride=patch)
    x = g.wide(g.add(x, g.param(f"{root}/pos_embed", g.dtype)))
    for i, block in enumerate(config.blocks):
        x = encoder_block(g, config, block, x, f"{root}/blocks_{i}")
    return neck(g, x, root)


def neck(g: Graph, x: str, root: str) -> str:
    """Applies SAM's neck: [b, h, w, D] float32 -> [b, C, h, w]."""
    x = g.layer_norm(g.wide(g.linear(g.half(x), f"{root}/neck_0")), f"{root}/neck_1")  # a 1 x 1 convolution
    x = g.layer_norm(g.wide(g.conv(g.half(x), f"{root}/neck_2", pad=1)), f"{root}/neck_3")
    return g.transpose(x, 0, 3, 1, 2)


def encoder_block(g: Graph, config: Config, block: Block, x: str, path: str) -> str:
    """Applies norm1, attention, residual; norm2, MLP, residual. x: [b, h, w, D]."""
    y = g.half(g.layer_norm(x, f"{path}/norm1"))
    if block.window == GLOBAL:
        y = attention(g, block, config.grid, y, f"{path}/attn")
    else:
        y = window_partition(g, y, block.window, config.grid, config.embed_dim)
        y = attention(g, block, (block.window, block.window), y, f"{path}/attn")
        y = window_unpartition(g, y, block.window, config.grid, config.embed_dim)
    x = g.add(x, g.wide(y))
    y = g.linear(g.half(g.layer_norm(x, f"{path}/norm2")), f"{path}/mlp_lin1")
    return g.add(x, g.wide(g.linear(g.gelu(y), f"{path}/mlp_lin2")))


def window_partition(g: Graph, x: str, window: int, grid: tuple[int, int], width: int) -> str:
    """Partitions [b, h, w, D] -> [b * windows, window, window, D], zero-padded at the bottom and right."""
    rows, columns = (-(-side // window) for side in grid)
    bottom, right = rows * window - grid[0], columns * window - grid[1]
    if bottom or right:
        x = g.op("Pad", x, (0, 0, 0, 0, 0, bottom, right, 0))
    x = g.reshape(x, -1, rows, window, columns, window, width)
    return g.reshape(g.transpose(x, 0, 1, 3, 2, 4, 5), -1, window, window, width)


def window_unpartition(g: Graph, x: str, window: int, grid: tuple[int, int], width: int) -> str:
    """Undoes `window_partition`; drops the padding."""
    rows, columns = (-(-side // window) for side in grid)
    x = g.transpose(g.reshape(x, -1, rows, columns, window, window, width), 0, 1, 3, 2, 4, 5)
    x = g.reshape(x, -1, rows * window, columns * window, width)
    if (rows * window, columns * window) == grid:
        return x
    return g.op("Slice", x, (0, 0), grid, (1, 2))


def attention(g: Graph, block: Block, span: tuple[int, int], x: str, path: str) -> str:
    """Attends within x, [b, h, w, D] with (h, w) == span. Returns the same shape."""
    (h, w), heads, dim = span, block.heads, block.head_dim
    split = lambda name: g.reshape(g.linear(x, f"{path}/{name}"), -1, h * w, heads, dim)
    q, v = (g.transpose(split(name), 0, 2, 1, 3) for name in "qv")  # [b, n, L, d]
    k = g.transpose(split("k"), 0, 2, 3, 1)  # [b, n, d, L]
    out = by_heads(g, heads, h * w, q, k, v, lambda *some: attend(g, *some, span, path))
    return g.linear(g.reshape(g.transpose(out, 0, 2, 1, 3), -1, h, w, heads * dim), f"{path}/proj")


def by_heads(g: Graph, heads: int, tokens: int, q: str, k: str, v: str, attend: Callable[[str, str, str], str]) -> str:
    """Calls `attend` with all heads of q, k, v, [b, n, ...] each, or with one after the other."""
    if heads * tokens**2 <= LOGITS_AT_ONCE:
        return attend(q, k, v)
    per_head = [[g.op("Slice", part, [i], [i + 1], [1]) for part in (q, k, v)] for i in range(heads)]
    return g.concat(*(attend(*head) for head in per_head), axis=1)


def attend(g: Graph, q: str, k: str, v: str, span: tuple[int, int], path: str) -> str:
    """Computes softmax(q k / sqrt(d) + q Rh + q Rw) v. q, v: [b, n, L, d]; k: [b, n, d, L]. Returns [b, n, L, d]."""
    dim = g.params[f"{path}/rel_pos_h"].shape[-1]
    logits = add_positions(g, g.op("MatMul", g.mul(q, dim**-0.5), k), q, span, path)
    tokens = span[0] * span[1]
    logits = g.op("Reshape", logits, g.concat(g.sizes(q, 0, 2), [tokens, tokens]))
    return g.op("MatMul", g.softmax(logits), v)


def add_positions(g: Graph, logits: str, q: str, span: tuple[int, int], path: str) -> str:
    """Adds positions to logits [b, n, L, L], by queries [b, n, L, d] before scaling -> [b * n * L, h, w]."""
    h, w = span
    heads = g.reshape(q, 0, 0, h, w, -1)
    by_row = g.op("MatMul", heads, by_distance(g, f"{path}/rel_pos_h", h))  # [b, n, h, w, h]
    by_column = g.op("MatMul", g.transpose(heads, 0, 1, 3, 2, 4), by_distance(g, f"{path}/rel_pos_w", w))
    by_column = g.transpose(by_column, 0, 1, 3, 2, 4)  # [b, n, h, w, w]
    logits = g.add(g.reshape(logits, -1, h, w), g.reshape(by_row, -1, h, 1))
    return g.add(logits, g.reshape(by_column, -1, 1, w))


def by_distance(g: Graph, path: str, side: int) -> str:
    """Expands the table [2 * side - 1, d] of a parameter to [side, d, side], by query and by key."""
    position = np.arange(side)
    table = g.params[path][position[:, None] - position + side - 1]
    return g.constant(table.transpose(0, 2, 1).astype(g.dtype), path)
