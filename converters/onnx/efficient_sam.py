"""Builds EfficientSAM's ViT, prompt encoder and mask decoder as ONNX graphs, of any widths.

They compute what `models.encoders.efficient_sam_vit` and `models.efficient_sam_head` do.
Shapes: b images, h x w tokens, D embedding channels, n heads, p prompts, C channels of the image's embedding.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import helper

from converters.onnx import decoder
from converters.onnx.decoder import TORCH_EPSILON, across, attention, encode_positions
from converters.onnx.encoder import by_heads, neck
from converters.onnx.graph import CUBIC, FLOAT, INT64, Graph
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.efficient_sam_head import INVALID, MOST_POINTS
from slimsam_jax.models.encoders.architecture import Block

ROOT, PROMPTS = "image_encoder", "prompt_encoder"


def image_encoder(g: Graph, config: SamConfig, pixels: str) -> str:
    """Encodes [b, 3, H, W] normalised images -> [b, C, h, w]."""
    c = config.encoder
    x = g.conv(g.half(g.transpose(pixels, 0, 2, 3, 1)), f"{ROOT}/patch_embed_proj", stride=c.patch_size)
    x = g.add(g.wide(x), positions(g, c.grid))
    for i, block in enumerate(c.blocks):
        path = f"{ROOT}/blocks_{i}"
        y = g.half(g.layer_norm(x, f"{path}/norm1"))
        x = g.add(x, g.wide(self_attention(g, block, c.grid, y, f"{path}/attn")))
        y = g.gelu(g.linear(g.half(g.layer_norm(x, f"{path}/norm2")), f"{path}/mlp_lin1"))
        x = g.add(x, g.wide(g.linear(y, f"{path}/mlp_lin2")))
    return neck(g, x, ROOT)


def positions(g: Graph, grid: tuple[int, int]) -> str:
    """The learnt positions, bicubic, [1, h, w, D]; in the graph, where they take less room. Row 0 is not theirs."""
    rows, width = g.params[f"{ROOT}/pos_embed"].shape
    side = math.isqrt(rows - 1)
    table = g.op("Slice", g.param(f"{ROOT}/pos_embed"), [1], [rows], [0])
    table = g.transpose(g.reshape(table, 1, side, side, width), 0, 3, 1, 2)
    return g.transpose(g.op("Resize", table, "", "", np.array([1, width, *grid]), **CUBIC), 0, 2, 3, 1)


def self_attention(g: Graph, block: Block, grid: tuple[int, int], x: str, path: str) -> str:
    """Attends to all tokens, x [b, h, w, D]. Returns the same shape."""
    tokens, heads = grid[0] * grid[1], block.heads
    split = lambda name, width: g.reshape(g.linear(x, f"{path}/{name}"), -1, tokens, heads, width)
    q = g.mul(g.transpose(split("q", block.key_dim), 0, 2, 1, 3), block.key_dim**-0.5)  # [b, n, L, d]
    k = g.transpose(split("k", block.key_dim), 0, 2, 3, 1)  # [b, n, d, L]
    v = g.transpose(split("v", block.value_dim), 0, 2, 1, 3)
    attend = lambda q, k, v: g.op("MatMul", g.softmax(g.op("MatMul", q, k)), v)
    out = g.transpose(by_heads(g, heads, tokens, q, k, v, attend), 0, 2, 1, 3)
    return g.linear(g.reshape(out, -1, *grid, heads * block.value_dim), f"{path}/proj")


def prompt_tokens(g: Graph, config: SamConfig, points: str, labels: str) -> str:
    """Encodes points [p, n, 2] (x, y) in pixels of the model frame, labels int64 [p, n] -> [p, 6, C].

    A graph has no words to refuse with but the names of its nodes, which onnxruntime says where it fails.
    """
    height, width = config.image_size
    points, labels = fill_points(g, points, limited(g, labels))
    encoded = encode_positions(g, g.op("Div", g.add(points, np.float32(0.5)), np.float32([width, height])))
    names = ("invalid_points", "point_embeddings", "bbox_top_left_embeddings", "bbox_bottom_right_embeddings")
    table = np.concatenate([g.params[f"{PROMPTS}/{name}"] for name in names]).astype(np.float32)
    rows = np.array([0, len(table), 1, 2, 3])  # of the labels -1, 0, 1, ..: of a background point there is none
    row = g.op("Gather", rows, g.op("Sub", labels, np.int64(INVALID)), name="labels_are_-1_1_2_3")
    return g.add(encoded, g.op("Gather", table, row, name="EfficientSAM_knows_no_background_points"))


def limited(g: Graph, labels: str) -> str:
    """The same labels [p, n], those below -1 as -1; fails for more than six points."""
    labels = g.op("Max", labels, np.int64(INVALID))
    count = g.op("ReduceSum", g.op("Cast", g.op("Greater", labels, np.int64(INVALID)), to=INT64), [1], keepdims=1)
    nothing = g.op("Gather", np.zeros(MOST_POINTS + 1, np.int64), count, name="EfficientSAM_takes_6_points_at_most")
    return g.add(labels, nothing)


def move_void(g: Graph, points: str, labels: str) -> str:
    """Moves points that are none to (-1, -1), where the original fills up: SAM's padding has places that mean nothing.

    As JAX does. Where the original's own inputs are taken, they stay: there a void point counts at its place.
    """
    void = g.op("Unsqueeze", g.op("Less", labels, np.int64(0)), [2])
    return g.op("Where", void, np.float32(-1), points)


def fill_points(g: Graph, points: str, labels: str) -> tuple[str, str]:
    """Fills prompts up to six points, those that are none last: [p, n, 2] and [p, n] -> [p, 6, 2] and [p, 6]."""
    points = g.op("Pad", points, (0, 0, 0, 0, MOST_POINTS, 0), np.float32(-1))
    labels = g.op("Pad", labels, (0, 0, 0, MOST_POINTS), np.int64(INVALID))
    keys = [g.op("Cast", g.op("Less", labels, np.int64(0)), to=FLOAT), g.constant([MOST_POINTS])]
    g.nodes.append(helper.make_node("TopK", keys, ["void", "order"], name="order", axis=1, largest=0, sorted=1))
    labels = g.op("GatherElements", labels, "order", axis=1)
    return g.op("GatherND", points, g.op("Unsqueeze", "order", [2]), batch_dims=1), labels


def mask_decoder(g: Graph, config: SamConfig, image: str, image_pe: str, sparse: str) -> tuple[str, str]:
    """See `decoder.mask_decoder`."""
    return decoder.mask_decoder(g, config, image, image_pe, sparse, KIND)


def two_way_block(
    g: Graph, config: SamConfig, image: str, image_pe: str, tokens: str, token_pe: str, index: int
) -> tuple[str, str]:
    """Later blocks add the positions to the tokens for good; the first one adds to its tokens, as all do."""
    path = f"{decoder.TRANSFORMER}/layers_{index}"
    tokens = tokens if index == 0 else g.add(tokens, token_pe)
    attended = attention(g, config, tokens, tokens, tokens, f"{path}/self_attn")
    tokens = g.layer_norm(g.add(tokens, attended), f"{path}/norm1", TORCH_EPSILON)
    return across(g, config, image, image_pe, tokens, token_pe, path, Graph.gelu)


def group_norm(g: Graph, x: str, path: str) -> str:
    """Normalises [p, h, w, c] over channels and positions together; float32 to float32."""
    mean = lambda x: g.reduce("ReduceMean", x, (1, 2, 3))
    x = g.op("Sub", x, mean(x))
    x = g.op("Div", x, g.op("Sqrt", g.add(mean(g.mul(x, x)), np.float32(TORCH_EPSILON))))
    return g.add(g.mul(x, g.param(f"{path}/scale")), g.param(f"{path}/bias"))


KIND = decoder.Kind(two_way_block, Graph.gelu, group_norm)
