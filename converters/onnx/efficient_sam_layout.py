"""Builds the two ONNX models that EfficientSAM's own export writes, with the names and shapes of its inputs.

Shapes: b images, q queries of each with n points, m masks, [C, h, w] an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from converters.onnx import efficient_sam
from converters.onnx.decoder import dense_positions
from converters.onnx.frames import scaled_points, squashed, squashed_masks
from converters.onnx.graph import FLOAT, INT64, Graph
from slimsam_jax.models.composed import SamConfig

Params = Mapping[str, np.ndarray]


def encoder(config: SamConfig, params: Params, dtype: Any = np.float32) -> onnx.ModelProto:
    """Builds `EfficientSam.get_image_embeddings`.

    Input `batched_images`: float32 [b, 3, height, width], RGB, 0..1, of any size: squashing and normalising are part of
    the graph. Output `image_embeddings`: float32 [b, C, h, w].
    """
    g = Graph(params, dtype)
    pixels = squashed(g, config, g.mul("batched_images", np.float32(255)))
    embedding = efficient_sam.image_encoder(g, config, pixels)
    inputs = {"batched_images": (FLOAT, ("batch", 3, "height", "width"))}
    outputs = {"image_embeddings": (embedding, ("batch", config.out_chans, *config.grid))}
    return g.model("efficient_sam_encoder", config, inputs, outputs)


def decoder(config: SamConfig, params: Params, dtype: Any = np.float32) -> onnx.ModelProto:
    """Builds `EfficientSam.predict_masks`, all masks but the single one.

    Inputs:
      image_embeddings float32 [b, C, h, w];
      batched_point_coords float32 [b, q, n, 2]: (x, y) in pixels of the image; batched_point_labels float32 [b, q, n]:
        1 a point, 2 and 3 the corners of a box, -1 none, which counts at its place as in the original: fill up with
        points at (-1, -1), as the original does, and as JAX and the layout `sam` take all that are none;
      orig_im_size int64 [2]: (height, width) of the image.
    Outputs, float32: output_masks [b, q, m, height, width], logits, bicubic as the original's Python gives them (its
      own export has them bilinear); iou_predictions [b, q, m]; low_res_masks [b * q, m, 4h, 4w]. m is
      multimask_outputs.
    """
    g = Graph(params, dtype)
    (h, w), width, many = config.grid, config.out_chans, config.multimask_outputs
    size, counts = g.op("Cast", "orig_im_size", to=FLOAT), g.sizes("batched_point_coords", 0, 2)
    points = g.op("Reshape", "batched_point_coords", g.concat([-1], g.sizes("batched_point_coords", 2, 4)))
    labels = g.op("Reshape", "batched_point_labels", g.concat([-1], g.sizes("batched_point_labels", 2, 3)))
    points, labels = scaled_points(g, config, points, size), g.op("Cast", labels, to=INT64)
    sparse = efficient_sam.prompt_tokens(g, config, points, labels)
    image = g.reshape(g.transpose("image_embeddings", 0, 2, 3, 1), -1, 1, h * w, width)
    image = g.reshape(g.op("Expand", image, g.concat(counts, (1, 1))), -1, h * w, width)  # queries of an image in a row
    masks, iou = efficient_sam.mask_decoder(g, config, image, dense_positions(g, config), sparse)
    masks, iou = (g.op("Slice", x, [1], [1 + many], [1]) for x in (masks, iou))
    split = lambda x, *rest: g.op("Reshape", x, g.concat(counts, [many], *rest))
    full = split(squashed_masks(g, config, masks, size), "orig_im_size")
    batch = ("batch", "num_queries")
    inputs = {
        "image_embeddings": (FLOAT, ("batch", width, h, w)),
        "batched_point_coords": (FLOAT, (*batch, "num_points", 2)),
        "batched_point_labels": (FLOAT, (*batch, "num_points")),
        "orig_im_size": (INT64, (2,)),
    }
    outputs = {
        "output_masks": (full, (*batch, many, "height", "width")),
        "iou_predictions": (split(iou), (*batch, many)),
        "low_res_masks": (masks, ("num_masks", many, 4 * h, 4 * w)),
    }
    return g.model("efficient_sam_decoder", config, inputs, outputs)
