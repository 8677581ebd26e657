"""Builds TinyViT as an ONNX graph: what `models.encoders.tiny_vit` computes, of any widths, batch norms folded.

Shapes: b images, h x w pixels or tokens, C channels of a stage, n heads, d channels per head of q and k, L tokens of a
window.
"""

from __future__ import annotations

import numpy as np

from converters.onnx.decoder import TORCH_EPSILON
from converters.onnx.encoder import neck, window_partition, window_unpartition
from converters.onnx.graph import Graph
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.encoders.tiny_vit_config import Stage

ROOT = "image_encoder"


def image_encoder(g: Graph, config: SamConfig, pixels: str) -> str:
    """Encodes [b, 3, H, W] normalised images -> [b, C, h, w]. The graph's parameters have no batch norms."""
    c = config.encoder
    x = g.conv(g.half(g.transpose(pixels, 0, 2, 3, 1)), f"{ROOT}/patch_embed_0", stride=2, pad=1)
    x = g.wide(g.conv(g.gelu(x), f"{ROOT}/patch_embed_2", stride=2, pad=1))
    for i in range(len(c.conv_blocks)):
        y = bottleneck(g, x, f"{ROOT}/layers_0/blocks_{i}")
        x = g.wide(g.gelu(g.half(g.add(x, y))))
    for i, (stage, grid) in enumerate(zip(c.stages, c.grids[1:], strict=True)):
        x = bottleneck(g, x, f"{ROOT}/layers_{i}/downsample", stage.stride)
        for j, block in enumerate(stage.blocks):
            x = attention_block(g, stage, block, grid, x, f"{ROOT}/layers_{i + 1}/blocks_{j}")
    return neck(g, x, ROOT)


def bottleneck(g: Graph, x: str, path: str, stride: int = 1) -> str:
    """1 x 1, GELU, depthwise 3 x 3, GELU, 1 x 1: [b, h, w, C] -> [b, h / stride, w / stride, C'], float32 both."""
    x = g.gelu(g.linear(g.half(x), f"{path}/conv1"))
    x = g.gelu(g.conv(x, f"{path}/conv2", stride, pad=1, depthwise=True))
    return g.wide(g.linear(x, f"{path}/conv3"))


def attention_block(g: Graph, stage: Stage, block: Block, grid: tuple[int, int], x: str, path: str) -> str:
    """Attention, residual; a depthwise convolution; MLP, residual. x: [b, h, w, C] float32, and so is the result."""
    windows = window_partition(g, x, stage.window, grid, stage.dim)  # padded before the norm, as the original
    y = attention(g, block, stage.window, g.half(norm(g, windows, f"{path}/attn/norm")), f"{path}/attn")
    x = g.add(x, window_unpartition(g, g.wide(y), stage.window, grid, stage.dim))
    x = g.wide(g.conv(g.half(x), f"{path}/local_conv", pad=1, depthwise=True))
    y = g.gelu(g.linear(g.half(norm(g, x, f"{path}/mlp/norm")), f"{path}/mlp/fc1"))
    return g.add(x, g.wide(g.linear(y, f"{path}/mlp/fc2")))


def norm(g: Graph, x: str, path: str) -> str:
    return g.layer_norm(x, path, TORCH_EPSILON)


def attention(g: Graph, block: Block, side: int, x: str, path: str) -> str:
    """Attends within windows x [b, side, side, C]. Returns the same shape."""
    tokens, heads = side * side, block.heads
    split = lambda name, width: g.reshape(g.linear(x, f"{path}/{name}"), -1, tokens, heads, width)
    q = g.transpose(split("q", block.key_dim), 0, 2, 1, 3)  # [b, n, L, d]
    k = g.transpose(split("k", block.key_dim), 0, 2, 3, 1)  # [b, n, d, L]
    v = g.transpose(split("v", block.value_dim), 0, 2, 1, 3)
    logits = g.op("MatMul", g.mul(q, block.key_dim**-0.5), k)
    out = g.op("MatMul", g.softmax(g.add(logits, by_distance(g, f"{path}/attention_biases"))), v)
    out = g.reshape(g.transpose(out, 0, 2, 1, 3), -1, side, side, heads * block.value_dim)
    return g.linear(out, f"{path}/proj")


def by_distance(g: Graph, path: str) -> str:
    """Expands a table by distance in rows and columns [n, h, w] to [n, L, L], by query and key; in the graph."""
    heads, h, w = g.params[path].shape
    y, x = np.divmod(np.arange(h * w), w)
    index = np.abs(y[:, None] - y) * w + np.abs(x[:, None] - x)
    return g.op("Gather", g.param(path, g.dtype, (heads, h * w)), index, axis=1)
