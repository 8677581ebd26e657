"""Builds prompt encoder and mask decoder as ONNX graphs: what `prompt_encoder.py` and `mask_decoder.py` compute.

Shapes: p prompts of n points, t tokens, h x w cells of the embedding (s = h * w), C channels, m masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from converters.onnx.graph import FLOAT, Graph
from slimsam_jax.models.sam import Architecture as Config

PROMPTS, DECODER, TRANSFORMER = "prompt_encoder", "mask_decoder", "mask_decoder/transformer"
TORCH_EPSILON = 1e-5  # of the two-way transformer's norms, and TinyViT's; 1e-6 everywhere else


class Kind(NamedTuple):
    """In what mask decoders differ.

    Attributes:
      block: of the two-way transformer, as `two_way_block`.
      activation: in the MLPs behind it.
      norm: between the two doublings; x [p, 2h, 2w, c] float32 and the path of its parameters.
    """

    block: Callable[..., tuple[str, str]]
    activation: Callable[[Graph, str], str]
    norm: Callable[[Graph, str, str], str]


def prompt_tokens(g: Graph, config: Config, points: str, labels: str) -> str:
    """Encodes points [p, n, 2] (x, y) in pixels of the model frame, labels int64 [p, n] -> [p, n, C].

    Labels are those of `PromptEncoder` but for ABSENT, which neither contract knows: below -1 the token is zero, which
    is not absent, as `SamModel` has it for -10.
    """
    height, width = config.image_size
    encoded = encode_positions(g, g.op("Div", g.add(points, np.float32(0.5)), np.float32([width, height])))
    real = g.op("Unsqueeze", g.op("Cast", g.op("Greater", labels, np.int64(-1)), to=FLOAT), [2])
    not_a_point = g.params[f"{PROMPTS}/not_a_point_embed"]
    kinds = [g.params[f"{PROMPTS}/point_embeddings_{i}"] for i in range(4)]
    table = np.concatenate([np.zeros_like(not_a_point), not_a_point, *kinds]).astype(np.float32)
    row = g.op("Clip", g.add(labels, np.int64(2)), np.int64(0), np.int64(len(table) - 1))
    return g.add(g.mul(encoded, real), g.op("Gather", table, row))


def encode_positions(g: Graph, coordinates: str | np.ndarray) -> str:
    """Computes random Fourier features of (x, y) in 0..1: [..., 2] -> [..., C]."""
    centred = g.op("Sub", g.mul(coordinates, np.float32(2)), np.float32(1))
    turns = g.op("MatMul", centred, g.param(f"{PROMPTS}/positional_encoding_gaussian_matrix"))
    phase = g.mul(turns, np.float32(2 * np.pi))
    return g.concat(g.op("Sin", phase), g.op("Cos", phase), axis=-1)


def dense_positions(g: Graph, config: Config) -> str:
    """Encodes the centres of the embedding's cells: [1, s, C]. In the graph, where it takes no room."""
    h, w = config.grid
    y, x = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
    return encode_positions(g, np.stack([x, y], axis=-1).reshape(1, h * w, 2).astype(np.float32))


def no_mask(g: Graph) -> str:
    """Returns what is added to the embedding if there is no mask prompt: [1, C]."""
    return g.param(f"{PROMPTS}/no_mask_embed")


def dense_embedding(g: Graph, config: Config, masks: str, flags: str) -> str:
    """Encodes masks [p, 1, 4h, 4w], of which those with a flag (float32 [p]) of 1 count -> [p, s, C]."""
    x = g.half(g.transpose(masks, 0, 2, 3, 1))
    for conv, norm in ((0, 1), (3, 4)):
        x = g.wide(g.conv(x, f"{PROMPTS}/mask_downscaling_{conv}", stride=2))
        x = g.gelu(g.half(g.layer_norm(x, f"{PROMPTS}/mask_downscaling_{norm}")))
    x = g.wide(g.conv(x, f"{PROMPTS}/mask_downscaling_6"))
    x = g.reshape(x, -1, config.grid[0] * config.grid[1], config.out_chans)
    flags = g.reshape(flags, -1, 1, 1)
    return g.add(g.mul(x, flags), g.mul(no_mask(g), g.op("Sub", np.float32(1), flags)))


def mask_decoder(
    g: Graph, config: Config, image: str, image_pe: str, sparse: str, kind: Kind | None = None
) -> tuple[str, str]:
    """Predicts all masks of p prompts.

    Args:
      image: [p, s, C], the image's embedding and the mask prompt's.
      image_pe: [1 or p, s, C].
      sparse: [p, n, C] from `prompt_tokens`.
      kind: SAM's if None.

    Returns:
      masks [p, m, 4h, 4w] logits, iou [p, m], m = 1 + multimask_outputs; float32.
    """
    kind, (h, w), width, outputs = kind or SAM, config.grid, config.out_chans, 1 + config.multimask_outputs
    learnt = np.concatenate([g.params[f"{DECODER}/iou_token"], g.params[f"{DECODER}/mask_tokens"]])[None]
    learnt = g.op("Expand", learnt.astype(np.float32), g.concat(g.sizes(sparse, 0, 1), (1 + outputs, width)))
    tokens, image = transformer(g, config, image, image_pe, g.concat(learnt, sparse, axis=1), kind.block)

    token = lambda i: g.half(g.op("Gather", tokens, np.int64(i), axis=1))  # [p, C]
    answer = lambda i, name: mlp(g, token(i), f"{DECODER}/{name}", kind.activation)
    hyper = [answer(1 + i, f"output_hypernetworks_mlps_{i}") for i in range(outputs)]
    hyper = g.concat(*(g.op("Unsqueeze", x, [1]) for x in hyper), axis=1)  # [p, m, c]
    upscaled = upscale(g, g.reshape(image, -1, h, w, width), kind.norm)
    narrow = g.params[f"{DECODER}/output_upscaling_3/bias"].size
    pixels = g.transpose(g.reshape(upscaled, -1, 16 * h * w, narrow), 0, 2, 1)
    masks = g.reshape(g.wide(g.op("MatMul", hyper, pixels)), -1, outputs, 4 * h, 4 * w)
    return masks, g.wide(answer(0, "iou_prediction_head"))


def mlp(g: Graph, x: str, path: str, activation: Callable[[Graph, str], str]) -> str:
    """Applies three layers with an activation between them."""
    for i in range(3):
        x = g.linear(x if i == 0 else activation(g, x), f"{path}/layers_{i}")
    return x


def relu(g: Graph, x: str) -> str:
    return g.op("Relu", x)


def upscale(g: Graph, x: str, norm: Callable[[Graph, str, str], str]) -> str:
    """Upscales [p, h, w, C] -> [p, 4h, 4w, c] by two transposed convolutions."""
    x = g.wide(g.conv_transpose(g.half(x), f"{DECODER}/output_upscaling_0", stride=2))
    x = g.gelu(g.half(norm(g, x, f"{DECODER}/output_upscaling_1")))
    return g.gelu(g.conv_transpose(x, f"{DECODER}/output_upscaling_3", stride=2))


def transformer(
    g: Graph, config: Config, image: str, image_pe: str, tokens: str, block: Callable[..., tuple[str, str]]
) -> tuple[str, str]:
    """Applies the two-way transformer. image, image_pe: [p, s, C]; tokens: [p, t, C]. Returns tokens, image."""
    token_pe = tokens
    for i in range(config.decoder_depth):
        tokens, image = block(g, config, image, image_pe, tokens, token_pe, i)
    path = f"{TRANSFORMER}/final_attn_token_to_image"
    attended = attention(g, config, g.add(tokens, token_pe), g.add(image, image_pe), image, path)
    return g.layer_norm(g.add(tokens, attended), f"{TRANSFORMER}/norm_final_attn", TORCH_EPSILON), image


def two_way_block(
    g: Graph, config: Config, image: str, image_pe: str, tokens: str, token_pe: str, index: int
) -> tuple[str, str]:
    """Attends tokens to themselves, tokens to image, then MLP on tokens, image to tokens."""
    path = f"{TRANSFORMER}/layers_{index}"
    q = tokens if index == 0 else g.add(tokens, token_pe)
    attended = attention(g, config, q, q, tokens, f"{path}/self_attn")
    # The first block replaces the tokens (they have no position yet), later ones add to them.
    tokens = g.layer_norm(attended if index == 0 else g.add(tokens, attended), f"{path}/norm1", TORCH_EPSILON)
    return across(g, config, image, image_pe, tokens, token_pe, path, relu)


def across(
    g: Graph,
    config: Config,
    image: str,
    image_pe: str,
    tokens: str,
    token_pe: str,
    path: str,
    activation: Callable[[Graph, str], str],
) -> tuple[str, str]:
    """The rest of a block: tokens to image, MLP on tokens, image to tokens."""
    norm = lambda x, i: g.layer_norm(x, f"{path}/norm{i}", TORCH_EPSILON)
    attend = lambda q, k, v, name: attention(g, config, q, k, v, f"{path}/{name}")
    placed = g.add(image, image_pe)
    attended = attend(g.add(tokens, token_pe), placed, image, "cross_attn_token_to_image")
    tokens = norm(g.add(tokens, attended), 2)
    hidden = activation(g, g.linear(g.half(tokens), f"{path}/mlp_lin1"))
    tokens = norm(g.add(tokens, g.wide(g.linear(hidden, f"{path}/mlp_lin2"))), 3)
    attended = attend(placed, g.add(tokens, token_pe), tokens, "cross_attn_image_to_token")
    return tokens, norm(g.add(image, attended), 4)


def attention(g: Graph, config: Config, q: str, k: str, v: str, path: str) -> str:
    """Attends q [p, t, C] to k, v [p, s, C], float32. Returns [p, t, C] float32."""
    heads = config.decoder_heads
    dim = g.params[f"{path}/q_proj/bias"].shape[-1]
    split = lambda x, name: g.reshape(g.linear(g.half(x), f"{path}/{name}"), 0, -1, heads, dim)
    q, k, v = split(q, "q_proj"), split(k, "k_proj"), split(v, "v_proj")
    logits = g.op("MatMul", g.transpose(q, 0, 2, 1, 3), g.transpose(k, 0, 2, 3, 1))
    weights = g.softmax(g.mul(logits, dim**-0.5))
    out = g.transpose(g.op("MatMul", weights, g.transpose(v, 0, 2, 1, 3)), 0, 2, 1, 3)
    return g.wide(g.linear(g.reshape(out, 0, -1, heads * dim), f"{path}/out_proj"))


SAM = Kind(two_way_block, relu, Graph.layer_norm)
