"""Builds SAM 2's prompt encoder and mask decoder as ONNX graphs, and the two models of the layout `sam2`.

They compute what `models.sam2_head` does. The layout has names, order and shapes of the exports that are made for
SAM 2 (samexporter's, and those after it).
Shapes: b images, p prompts of n points, t tokens, m masks, h x w cells of the embedding, C its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from converters.onnx import hiera
from converters.onnx.decoder import (
    DECODER,
    dense_embedding,
    dense_positions,
    mlp,
    prompt_tokens,
    relu,
    transformer,
    two_way_block,
)
from converters.onnx.graph import FLOAT, INT64, Graph
from slimsam_jax.imaging.prompts import BOX_TOP_LEFT, NOT_A_POINT
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.sam2_head import LARGEST_LOW_RES, STABILITY_OFFSET, STABLE

Params = Mapping[str, np.ndarray]
FINER = {"high_res_feats_0": "high_res_0", "high_res_feats_1": "high_res_1"}  # as both layouts call them, and we


def encoder(config: SamConfig, params: Params, dtype: Any = np.float32) -> onnx.ModelProto:
    """Builds the image encoder.

    Input `image`: float32 [b, 3, H, W], stretched to the model frame and normalised.
    Outputs, float32: high_res_feats_0 [b, C/8, 4h, 4w], high_res_feats_1 [b, C/4, 2h, 2w], image_embed [b, C, h, w].
    """
    g = Graph(params, dtype)
    maps, shapes = hiera.image_encoder(g, config, "image"), map_shapes(config, "batch_size")
    inputs = {"image": (FLOAT, ("batch_size", 3, *config.image_size))}
    outputs = {name: (maps[ours], shapes[name]) for name, ours in FINER.items()}
    embed = {"image_embed": (maps["embedding"], ("batch_size", config.out_chans, *config.grid))}
    return g.model("sam2_encoder", config, inputs, outputs | embed)


def map_shapes(config: SamConfig, count: int | str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the finer maps."""
    encoder = config.encoder
    return {name: (count, encoder.high_res_dims[i], *encoder.grids[i]) for i, name in enumerate(FINER)}


def decoder(
    config: SamConfig, params: Params, dtype: Any = np.float32, return_single_mask: bool = False
) -> onnx.ModelProto:
    """Builds prompt encoder and mask decoder.

    Inputs, float32 all:
      image_embed [1, C, h, w], high_res_feats_0, high_res_feats_1: from the encoder, and in this order;
      point_coords [p, n, 2]: (x, y) in pixels of the model frame; point_labels [p, n]: 0 background, 1 foreground, 2
        and 3 the corners of a box, -1 not a point. Every prompt gets one more "not a point" in the graph, as in the
        original, which has it after a box, too;
      mask_input [p, 1, 4h, 4w]: logits; has_mask_input [1 or p]: 1, or 0 to ignore them.
    Outputs, float32: masks [p, m, 4h, 4w]: logits within -32 to 32; iou_predictions [p, m]. m is multimask_outputs; or,
      if `return_single_mask`, 1: the single mask, which gives way to the best of the others where it is unstable.
    """
    g = Graph(params, dtype)
    (h, w), many = config.grid, config.multimask_outputs
    extra = g.filled(g.concat(g.sizes("point_labels", 0, 1), [1]), np.int64(1))
    masks, iou = masks_of(g, config, "image_embed", "point_coords", "point_labels", extra)
    start, end = (0, 1) if return_single_mask else (1, 1 + many)
    masks, iou = (g.op("Slice", x, [start], [end], [1]) for x in (masks, iou))
    masks = g.op("Clip", masks, np.float32(-LARGEST_LOW_RES), np.float32(LARGEST_LOW_RES))
    inputs = {"image_embed": (FLOAT, (1, config.out_chans, h, w))}
    inputs |= {name: (FLOAT, shape) for name, shape in map_shapes(config, 1).items()}
    inputs |= {
        "point_coords": (FLOAT, ("num_labels", "num_points", 2)),
        "point_labels": (FLOAT, ("num_labels", "num_points")),
        "mask_input": (FLOAT, ("num_mask_inputs", 1, 4 * h, 4 * w)),
        "has_mask_input": (FLOAT, ("num_has_mask_inputs",)),
    }
    count = end - start
    outputs = {
        "masks": (masks, ("num_labels", count, 4 * h, 4 * w)),
        "iou_predictions": (iou, ("num_labels", count)),
    }
    return g.model("sam2_decoder", config, inputs, outputs)


def boxed(g: Graph, labels: str) -> str:
    """How many padding points prompts get that end as Segment Anything's do: [p, 1] of 1 if they have boxes, or of 0.

    Fails if some have a box and some have none: no shape holds both.
    """
    corners = g.op("Cast", g.op("Equal", labels, np.float32(BOX_TOP_LEFT)), to=INT64)
    own = g.op("Min", g.op("ReduceSum", corners, [1], keepdims=1), [1])
    count, total = g.op("ReduceSum", own, [0], keepdims=0), g.op("Squeeze", g.sizes(labels, 0, 1))
    mixed = g.op("Mul", count, g.op("Sub", total, count))  # 0 only if all or none
    nothing = g.op("Gather", np.zeros(1, np.int64), mixed, name="prompts_with_a_box_and_without_go_into_two_calls")
    return g.add(own, nothing)


def masks_of(g: Graph, config: SamConfig, embedding: str, points: str, labels: str, extra: str) -> tuple[str, str]:
    """Masks [p, m, 4h, 4w] and predicted IoU [p, m] of the inputs of a decoder, the single mask first.

    Args:
      embedding: [1, C, h, w]; the finer maps, mask_input and has_mask_input have one name in all layouts.
      points, labels: [p, n, 2] in pixels of the model frame, [p, n] float32.
      extra: [p, 1] int64, all 1 if each prompt gets a padding point, or all 0.
    """
    (h, w), count = config.grid, g.sizes(points, 0, 1)
    more = g.op("ReduceMax", extra, keepdims=0)
    shape = g.concat(count, g.reshape(more, 1))
    points = g.concat(points, g.filled(g.concat(shape, [2]), np.float32(0)), axis=1)
    labels = g.concat(g.op("Cast", labels, to=INT64), g.filled(shape, np.int64(NOT_A_POINT)), axis=1)
    sparse = prompt_tokens(g, config, points, labels)
    image = g.reshape(g.transpose(embedding, 0, 2, 3, 1), 1, h * w, config.out_chans)
    image = g.add(image, dense_embedding(g, config, "mask_input", "has_mask_input"))
    image = g.op("Expand", image, g.concat(count, (1, 1)))
    masks, iou = mask_decoder(g, config, image, dense_positions(g, config), sparse)
    return stable_first(g, masks, iou) if config.dynamic_multimask else (masks, iou)


def mask_decoder(g: Graph, config: SamConfig, image: str, image_pe: str, sparse: str) -> tuple[str, str]:
    """Predicts all masks of p prompts; see `decoder.mask_decoder`. The token of the object's score attends, no more."""
    (h, w), width, outputs = config.grid, config.out_chans, 1 + config.multimask_outputs
    names = ("obj_score_token", "iou_token", "mask_tokens")
    learnt = np.concatenate([g.params[f"{DECODER}/{name}"] for name in names])[None].astype(np.float32)
    learnt = g.op("Expand", learnt, g.concat(g.sizes(sparse, 0, 1), (2 + outputs, width)))
    tokens, image = transformer(g, config, image, image_pe, g.concat(learnt, sparse, axis=1), two_way_block)
    token = lambda i: g.half(g.op("Gather", tokens, np.int64(i), axis=1))  # [p, C]
    answer = lambda i, name: mlp(g, token(i), f"{DECODER}/{name}", relu)
    hyper = [answer(2 + i, f"output_hypernetworks_mlps_{i}") for i in range(outputs)]
    hyper = g.concat(*(g.op("Unsqueeze", x, [1]) for x in hyper), axis=1)  # [p, m, c]
    pixels = g.reshape(upscale(g, g.reshape(image, -1, h, w, width)), -1, 16 * h * w, width // 8)
    masks = g.reshape(g.wide(g.op("MatMul", hyper, g.transpose(pixels, 0, 2, 1))), -1, outputs, 4 * h, 4 * w)
    iou = g.wide(answer(1, "iou_prediction_head"))
    return masks, g.op("Sigmoid", iou) if config.iou_sigmoid else iou


def upscale(g: Graph, x: str) -> str:
    """[p, h, w, C] -> [p, 4h, 4w, C/8], a finer map joining after each doubling."""
    doubled = lambda x, i: g.wide(g.conv_transpose(g.half(x), f"{DECODER}/output_upscaling_{i}", stride=2))
    finer = lambda name: g.transpose(name, 0, 2, 3, 1)
    x = g.layer_norm(g.add(doubled(x, 0), finer("high_res_feats_1")), f"{DECODER}/output_upscaling_1")
    x = g.add(doubled(g.gelu(g.half(x)), 3), finer("high_res_feats_0"))
    return g.gelu(g.half(x))


def stable_first(g: Graph, masks: str, iou: str) -> tuple[str, str]:
    """Puts the best of 1.. at 0 where mask 0 is unstable: what `sam2_head.stable_first` does."""
    (single, _), (rest, scores) = (
        [g.op("Slice", x, [a], [b], [1]) for x in (masks, iou)] for a, b in ((0, 1), (1, 2**31))
    )
    above = lambda cut: g.op("Cast", g.op("Greater", single, np.float32(cut)), to=FLOAT)
    inner, outer = (g.op("ReduceSum", above(cut), [2, 3], keepdims=0) for cut in (STABILITY_OFFSET, -STABILITY_OFFSET))
    ratio = g.op("Div", inner, g.op("Max", outer, np.float32(1)))  # [p, 1]; an empty mask is stable
    stable = g.op("Or", g.op("GreaterOrEqual", ratio, np.float32(STABLE)), g.op("Equal", outer, np.float32(0)))
    best = g.add(g.op("ArgMax", scores, axis=1, keepdims=1), [1])
    first = g.op("Where", stable, [0], best)
    pick = lambda x: g.op("Unsqueeze", g.op("GatherND", x, first, batch_dims=1), [1])
    return g.concat(pick(masks), rest, axis=1), g.concat(pick(iou), scores, axis=1)
