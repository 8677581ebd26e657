"""Builds RepViT as an ONNX graph: what `models.encoders.rep_vit` computes, of any widths, folded.

Written from the same facts as that module, and from it alone; see there for licences.
Shapes: b images, h x w pixels of a stage, C its channels.
"""

from __future__ import annotations

import numpy as np

from converters.onnx.encoder import neck
from converters.onnx.graph import CUBIC, Graph
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.encoders.rep_vit_config import Block

ROOT = "image_encoder"


def image_encoder(g: Graph, config: SamConfig, pixels: str) -> str:
    """Encodes [b, 3, H, W] normalised images -> [b, C, h, w]. Of each block's branches one filter is left."""
    x = g.conv(g.half(g.transpose(pixels, 0, 2, 3, 1)), f"{ROOT}/stem_0", stride=2, pad=1)
    x = g.wide(g.conv(g.gelu(x), f"{ROOT}/stem_2", stride=2, pad=1))
    ends = []
    for i, stage in enumerate(config.encoder.stages):
        for j, block in enumerate(stage.blocks):
            x = mixer_block(g, block, x, f"{ROOT}/stages_{i}/blocks_{j}", strided=i > 0 and j == 0)
        ends.append(x)
    fine, coarse = (g.wide(g.linear(g.half(ends[i]), f"{ROOT}/fuse_{i}")) for i in (2, 3))
    return neck(g, g.add(fine, doubled(g, coarse)), ROOT)


def mixer_block(g: Graph, block: Block, x: str, path: str, strided: bool) -> str:
    """Mixes tokens, then channels by an MLP with a residual: [b, h, w, C] float32, halved to other C if strided."""
    y = g.wide(g.conv(g.half(x), f"{path}/conv", 2 if strided else 1, pad=1, depthwise=True))
    if block.squeezed:
        y = squeeze_excite(g, y, f"{path}/squeeze")
    if strided:
        y = g.wide(g.linear(g.half(y), f"{path}/project"))
    hidden = g.gelu(g.linear(g.half(y), f"{path}/mixer_0"))
    return g.add(y, g.wide(g.linear(hidden, f"{path}/mixer_2")))


def squeeze_excite(g: Graph, x: str, path: str) -> str:
    """Gates each channel by what two layers make of all channels' means: [b, h, w, C] float32, and so is the result."""
    means = g.half(g.reduce("ReduceMean", x, (1, 2)))
    hidden = g.op("Relu", g.linear(means, f"{path}/fc1"))
    return g.mul(x, g.wide(g.op("Sigmoid", g.linear(hidden, f"{path}/fc2"))))


def doubled(g: Graph, x: str) -> str:
    """Twice the rows and columns, bicubic: [b, h, w, C] -> [b, 2h, 2w, C] float32."""
    x = g.op("Resize", g.transpose(x, 0, 3, 1, 2), "", np.array([1, 1, 2, 2], np.float32), **CUBIC)
    return g.transpose(x, 0, 2, 3, 1)
