"""Builds the four ONNX models we write: encoder and decoder, as Meta's tools and as transformers.js call them.

Shapes: b images, p prompts of n points, m masks, [C, h, w] an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from converters.onnx import efficient_sam, encoder, hiera, rep_vit, sam2, tiny_vit
from converters.onnx.decoder import dense_embedding, dense_positions, mask_decoder, no_mask, prompt_tokens
from converters.onnx.frames import way_of
from converters.onnx.graph import FLOAT, INT64, UINT8, Graph
from slimsam_jax.imaging.prompts import NOT_A_POINT
from slimsam_jax.inference.ranking import ranks_by_stability
from slimsam_jax.models import heads
from slimsam_jax.models.encoders import name_of
from slimsam_jax.models.sam import Architecture as Config

Params = Mapping[str, np.ndarray]  # paths joined by slashes
ENCODERS = {  # of the families that go to ONNX
    "vit": encoder.image_encoder,
    "tiny_vit": tiny_vit.image_encoder,
    "efficient_sam": efficient_sam.image_encoder,
    "rep_vit": rep_vit.image_encoder,
    "hiera": hiera.image_encoder,
}


def image_encoder(g: Graph, config: Config, pixels: str) -> str | dict[str, str]:
    """Encodes [b, 3, H, W] normalised images -> [b, C, h, w], by the encoder's family; of SAM 2 its three maps."""
    return ENCODERS[name_of(config.encoder)](g, config, pixels)


def sam_encoder(config: Config, params: Params, dtype: Any = np.float32) -> onnx.ModelProto:
    """Builds `SamPredictor.set_torch_image`: `Sam.preprocess` and the image encoder.

    Input `images`: uint8 [b, 3, height, width], RGB, scaled to fit the model frame (`ResizeLongestSide.apply_image`)
    and not padded: normalising and padding are part of the graph. Of EfficientSAM the image as it is, of any size:
    squashing is part of the graph. One that was scaled to fit is scaled twice then, and was smoothed in between. So is
    SAM 2's, stretching in the place of squashing.
    Output `image_embeddings`: float32 [b, C, h, w]; of SAM 2 high_res_feats_0 and high_res_feats_1 as well.
    """
    g = Graph(params, dtype)
    pixels = way_of(config).place(g, config, g.op("Cast", "images", to=FLOAT))
    maps = image_encoder(g, config, pixels)
    maps = {"embedding": maps} if isinstance(maps, str) else maps
    inputs = {"images": (UINT8, ("batch_size", 3, "height", "width"))}
    outputs = {"image_embeddings": (maps.pop("embedding"), ("batch_size", config.out_chans, *config.grid))}
    outputs |= {name: (maps[sam2.FINER[name]], shape) for name, shape in finer_maps(config, "batch_size").items()}
    return g.model("sam_encoder", config, inputs, outputs)


def finer_maps(config: Config, count: int | str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the maps beside the embedding, by their names, of those who have some."""
    return sam2.map_shapes(config, count) if heads.name_of(config.head) == "sam2" else {}


def vision_encoder(config: Config, params: Params, dtype: Any = np.float32) -> onnx.ModelProto:
    """Builds what transformers.js runs as `vision_encoder`.

    Input `pixel_values`: float32 [b, 3, H, W], normalised and then padded to the model frame. transformers.js scales
    images otherwise than everyone else before that (tests/converters/test_transformers_js.py); the graph cannot make up
    for it.
    Outputs `image_embeddings` and `image_positional_embeddings`: float32 [b, C, h, w].
    """
    g = Graph(params, dtype)
    embedding = image_encoder(g, config, "pixel_values")
    shape = (config.out_chans, *config.grid)
    positions = g.transpose(g.reshape(dense_positions(g, config), 1, *config.grid, config.out_chans), 0, 3, 1, 2)
    positions = g.op("Expand", positions, g.concat(g.sizes("pixel_values", 0, 1), shape))
    inputs = {"pixel_values": (FLOAT, ("batch_size", 3, *config.image_size))}
    outputs = {
        "image_embeddings": (embedding, ("batch_size", *shape)),
        "image_positional_embeddings": (positions, ("batch_size", *shape)),
    }
    return g.model("vision_encoder", config, inputs, outputs)


def sam_decoder(
    config: Config, params: Params, dtype: Any = np.float32, return_single_mask: bool = False
) -> onnx.ModelProto:
    """Builds `segment_anything.utils.onnx.SamOnnxModel`, for p prompts at once where it takes one.

    Inputs, float32 all:
      image_embeddings [1, C, h, w]; of SAM 2 high_res_feats_0 and high_res_feats_1, too;
      point_coords [p, n, 2]: (x, y) in pixels of the image scaled to fit the model frame, as `ResizeLongestSide` gives
        them; EfficientSAM's graph scales them on, and SAM 2's; point_labels [p, n]: 0 background, 1 foreground, 2 and 3
        the corners of a box, -1 not a point. A prompt without a box ends with a "not a point" at (0, 0), as the
        original's do; of SAM 2 those with a box get it in the graph, so all prompts of a call have a box, or none has;
      mask_input [1 or p, 1, 4h, 4w]: logits; has_mask_input [1 or p]: 1, or 0 to ignore them, EfficientSAM's only one;
      orig_im_size [2]: (height, width) of the image.
    Outputs, float32:
      masks [p, m, height, width]: logits in the image; iou_predictions [p, m]: see `scores`; low_res_masks
        [p, m, 4h, 4w].
      m is 1 + multimask_outputs, the first the single mask; or, if `return_single_mask`, 1: the first for more than
      two points, else the best of the others, as the original chooses.
    """
    g = Graph(params, dtype)
    h, w = config.grid
    masks, iou = HEADS[heads.name_of(config.head)](g, config)
    if not config.single_mask:
        masks, iou = best_first(g, masks, iou)
    iou = scores(g, config, masks, iou)
    if return_single_mask:
        masks, iou = select_mask(g, config, masks, iou, g.sizes("point_coords", 1, 2))
    count = 1 if return_single_mask else 1 + config.multimask_outputs
    inputs = {
        "image_embeddings": (FLOAT, (1, config.out_chans, h, w)),
        **{name: (FLOAT, shape) for name, shape in finer_maps(config, 1).items()},
        "point_coords": (FLOAT, ("num_prompts", "num_points", 2)),
        "point_labels": (FLOAT, ("num_prompts", "num_points")),
        "mask_input": (FLOAT, ("num_mask_inputs", 1, 4 * h, 4 * w)),
        "has_mask_input": (FLOAT, ("num_has_mask_inputs",)),
        "orig_im_size": (FLOAT, (2,)),
    }
    outputs = {
        "masks": (way_of(config).masks(g, config, masks, "orig_im_size"), ("num_prompts", count, "height", "width")),
        "iou_predictions": (iou, ("num_prompts", count)),
        "low_res_masks": (masks, ("num_prompts", count, 4 * h, 4 * w)),
    }
    return g.model("sam_decoder", config, inputs, outputs)


def sam_masks(g: Graph, config: Config) -> tuple[str, str]:
    """Masks [p, m, 4h, 4w] and predicted IoU [p, m] of the inputs of `sam_decoder`."""
    sparse = prompt_tokens(g, config, "point_coords", g.op("Cast", "point_labels", to=INT64))
    image = g.add(image_tokens(g, config), dense_embedding(g, config, "mask_input", "has_mask_input"))
    image = g.op("Expand", image, g.concat(g.sizes("point_coords", 0, 1), (1, 1)))
    return mask_decoder(g, config, image, dense_positions(g, config), sparse)


def efficient_sam_masks(g: Graph, config: Config) -> tuple[str, str]:
    """The same of EfficientSAM; fails for a mask as a prompt."""
    given = g.op("Cast", g.op("ReduceMax", "has_mask_input", keepdims=0), to=INT64)
    nothing = g.op("Gather", np.zeros(1, np.int64), given, name="EfficientSAM_takes_no_mask_as_a_prompt")
    labels = g.add(g.op("Cast", "point_labels", to=INT64), nothing)
    points = way_of(config).points(g, config, "point_coords", "orig_im_size")
    sparse = efficient_sam.prompt_tokens(g, config, efficient_sam.move_void(g, points, labels), labels)
    image = g.op("Expand", image_tokens(g, config), g.concat(g.sizes("point_coords", 0, 1), (1, 1)))
    return efficient_sam.mask_decoder(g, config, image, dense_positions(g, config), sparse)


def sam2_masks(g: Graph, config: Config) -> tuple[str, str]:
    """The same of SAM 2, of which the single mask gives way where it is unstable."""
    points = way_of(config).points(g, config, "point_coords", "orig_im_size")
    return sam2.masks_of(g, config, "image_embeddings", points, "point_labels", sam2.boxed(g, "point_labels"))


def image_tokens(g: Graph, config: Config) -> str:
    """The image's embedding as [1, s, C]."""
    h, w = config.grid
    return g.reshape(g.transpose("image_embeddings", 0, 2, 3, 1), 1, h * w, config.out_chans)


HEADS = {"sam": sam_masks, "efficient_sam": efficient_sam_masks, "sam2": sam2_masks}


def scores(g: Graph, config: Config, masks: str, iou: str) -> str:
    """What masks are ranked by [p, m]: predicted IoU, or the stability of logits [p, m, 4h, 4w].

    Stability in the place of the estimates that EdgeSAM's decoder has not learned, as `inference.ranking` has it:
    whoever takes the mask of the highest value then takes the one that EdgeSAM takes.
    """
    if not ranks_by_stability(config):
        return iou
    above = lambda cut: g.op("Cast", g.op("Greater", masks, np.float32(cut)), to=FLOAT)
    inner, outer = (g.op("ReduceSum", above(cut), [2, 3], keepdims=0) for cut in (1, -1))
    return g.op("Div", inner, g.op("Max", outer, np.float32(1)))


def select_mask(g: Graph, config: Config, masks: str, iou: str, points: str) -> tuple[str, str]:
    """Selects one mask: [p, m, 4h, 4w], [p, m] -> [p, 1, 4h, 4w], [p, 1]; `points` is their number, int64 [1]."""
    bonus = np.array([[1000.0] + [0.0] * config.multimask_outputs], np.float32)
    surplus = g.op("Sub", g.op("Cast", points, to=FLOAT), np.float32(2.5))
    best = g.op("ArgMax", g.add(iou, g.mul(surplus, bonus)), axis=1, keepdims=1)
    pick = lambda x: g.op("Unsqueeze", g.op("GatherND", x, best, batch_dims=1), [1])
    return pick(masks), pick(iou)


def best_first(g: Graph, masks: str, iou: str) -> tuple[str, str]:
    """Puts the best of 1.. at 0, as `sam.decode` does for a decoder without a single mask; shapes stay."""
    rest = [g.op("Slice", x, [1], [2**31], [1]) for x in (masks, iou)]
    best = g.op("ArgMax", rest[1], axis=1, keepdims=1)
    first = lambda x: g.op("Unsqueeze", g.op("GatherND", x, best, batch_dims=1), [1])
    return tuple(g.concat(first(x), x, axis=1) for x in rest)


def prompt_encoder_mask_decoder(config: Config, params: Params, dtype: Any = np.float32) -> onnx.ModelProto:
    """Builds what transformers.js runs under this name: `SamModel` with `multimask_output=True`.

    It has no input for a mask prompt, nor for the single mask: transformers.js passes points, labels and boxes alone.

    Inputs, for b images with p prompts each:
      input_points float32 [b, p, n, 2]: (x, y) in pixels of the model frame; input_labels int64 [b, p, n]: 0, 1, -1
        not a point, -10 nothing at all; and, which `SamModel` does not know, 2 and 3 for the corners of a box. Like
        `SamModel` it appends a "not a point", unless a label is 2 or 3;
      image_embeddings, image_positional_embeddings float32 [b, C, h, w], from `vision_encoder`.
    Outputs: iou_scores float32 [b, p, m], see `scores`; pred_masks float32 [b, p, m, 4h, 4w], logits; m is
      multimask_outputs.
    """
    g = Graph(params, dtype)
    (h, w), many = config.grid, config.multimask_outputs
    counts = g.sizes("input_points", 0, 2)
    points = g.op("Reshape", "input_points", g.concat([-1], g.sizes("input_points", 2, 4)))
    labels = g.op("Reshape", "input_labels", g.concat([-1], g.sizes("input_labels", 2, 3)))
    sparse = prompt_tokens(g, config, *append_not_a_point(g, points, labels))

    def per_prompt(value: str) -> str:
        x = g.reshape(g.transpose(value, 0, 2, 3, 1), -1, 1, h * w, config.out_chans)
        return g.reshape(g.op("Expand", x, g.concat(counts, (1, 1))), -1, h * w, config.out_chans)

    image = g.add(per_prompt("image_embeddings"), no_mask(g))
    masks, iou = mask_decoder(g, config, image, per_prompt("image_positional_embeddings"), sparse)
    iou = scores(g, config, masks, iou)
    split = lambda x, *rest: g.op("Reshape", g.op("Slice", x, [1], [1 + many], [1]), g.concat(counts, (many, *rest)))
    shape = ("batch_size", "point_batch_size", many)
    inputs = {
        "input_points": (FLOAT, ("batch_size", "point_batch_size", "nb_points_per_image", 2)),
        "input_labels": (INT64, ("batch_size", "point_batch_size", "nb_points_per_image")),
        "image_embeddings": (FLOAT, ("batch_size", config.out_chans, h, w)),
        "image_positional_embeddings": (FLOAT, ("batch_size", config.out_chans, h, w)),
    }
    outputs = {"iou_scores": (split(iou), shape), "pred_masks": (split(masks, 4 * h, 4 * w), (*shape, 4 * h, 4 * w))}
    return g.model("prompt_encoder_mask_decoder", config, inputs, outputs)


def append_not_a_point(g: Graph, points: str, labels: str) -> tuple[str, str]:
    """Appends to points [p, n, 2] and labels [p, n] a "not a point"; not if any label is a corner of a box."""
    largest = g.reshape(g.op("ReduceMax", labels, keepdims=0), 1)
    count = g.op("Cast", g.op("Less", largest, [2]), to=INT64)
    shape = g.concat(g.sizes(labels, 0, 1), count)
    points = g.concat(points, g.filled(g.concat(shape, [2]), np.float32(0)), axis=1)
    return points, g.concat(labels, g.filled(shape, np.int64(NOT_A_POINT)), axis=1)
