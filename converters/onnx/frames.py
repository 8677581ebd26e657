"""How images come into the model frame of a graph, points after them, and masks out of it: what `imaging.frames` does.

Shapes: b images, p prompts of n points, m masks. `original_size` is a float32 [2], (height, width) of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from converters.onnx.graph import ANTIALIASED, BILINEAR, CUBIC, INT64, Graph
from slimsam_jax.imaging.frames import Fitted, Squashed, Stretched
from slimsam_jax.models.sam import Architecture as Config


class Way(NamedTuple):
    """One way into the model frame and back.

    Attributes:
      place: images [b, 3, height, width] float32, 0..255 -> [b, 3, H, W], normalised.
      points: (x, y) [p, n, 2] as tools made for Segment Anything scale them, by `ResizeLongestSide`, and the original
        size -> in the model frame.
      masks: [p, m, 4h, 4w] logits and the original size -> [p, m, height, width].
    """

    place: Callable[[Graph, Config, str], str]
    points: Callable[[Graph, Config, str, str], str]
    masks: Callable[[Graph, Config, str, str], str]


def way_of(config: Config) -> Way:
    return WAYS[type(config.frame)]


def normalised(g: Graph, config: Config, images: str) -> str:
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    return g.op("Div", g.op("Sub", images, mean), std)


def padded(g: Graph, config: Config, images: str) -> str:
    """Pads images that were scaled to fit."""
    # Never negative, which would crop: an image larger than the frame fails where positions are added instead.
    missing = g.op("Max", g.op("Sub", config.image_size, g.sizes(images, 2, 4)), [0])
    return g.op("Pad", normalised(g, config, images), g.concat([0] * 6, missing))


def cropped_masks(g: Graph, config: Config, masks: str, original_size: str) -> str:
    """Enlarges logits to the model frame, drops the padding, and resizes to the original size."""
    larger = config.patch_size / 4
    masks = g.op("Resize", masks, "", np.array([1, 1, larger, larger], np.float32), **BILINEAR)
    size = g.op("Cast", fitted_size(g, config, original_size), to=INT64)
    return resized(g, g.op("Slice", masks, (0, 0), size, (2, 3)), g.op("Cast", original_size, to=INT64), BILINEAR)


def fitted_size(g: Graph, config: Config, original_size: str) -> str:
    """(height, width) of the image scaled to fit the model frame: whole pixels, float32 [2]."""
    scale = g.op("ReduceMin", g.op("Div", np.array(config.image_size, np.float32), original_size))
    size = g.op("Floor", g.add(g.mul(original_size, scale), np.float32(0.5)))
    return g.op("Max", size, np.float32(1))


def squashed(g: Graph, config: Config, images: str) -> str:
    """Squashes images of any size, without antialiasing."""
    return normalised(g, config, resized(g, images, np.array(config.image_size), BILINEAR))


def squashed_points(g: Graph, config: Config, points: str, original_size: str) -> str:
    """Scales points on from the frame that the image would fit."""
    return scaled_points(g, config, points, fitted_size(g, config, original_size))


def scaled_points(g: Graph, config: Config, points: str, size: str) -> str:
    """Scales (x, y) in an image of `size`, float32 [2], to the squashed one; what is negative becomes -1."""
    width_first = g.op("Gather", size, np.array([1, 0]))
    scaled = g.op("Div", g.mul(points, np.array(config.image_size[::-1], np.float32)), width_first)
    return g.op("Where", g.op("Less", points, np.float32(0)), np.float32(-1), scaled)


def squashed_masks(g: Graph, config: Config, masks: str, original_size: str) -> str:
    """Resizes logits to the original size, bicubic.

    By a matrix for each axis: for four masks of 900 x 1200 that takes 0.03 CPU seconds, and onnxruntime's Resize 0.43,
    fourteen times what the rest of the decoder does.
    """
    sides = (g.op("Gather", original_size, np.int64(axis)) for axis in (0, 1))
    rows, columns = (bicubic_matrix(g, 4 * cells, side) for cells, side in zip(config.grid, sides, strict=True))
    masks = g.op("Pad", masks, (0, 0, 2, 2, 0, 0, 2, 2), mode="edge")
    return g.op("MatMul", rows, g.op("MatMul", masks, g.transpose(columns, 1, 0)))


def bicubic_matrix(g: Graph, source: int, target: str) -> str:
    """Weights of `imaging.bicubic` with borders repeated: [target, source + 4], `target` a float32 []."""
    a, places = CUBIC["cubic_coeff_a"], g.op("Range", np.float32(0), target, np.float32(1))
    scaled = g.mul(g.add(places, np.float32(0.5)), g.op("Div", np.float32(source), target))
    centres = g.op("Unsqueeze", g.op("Sub", scaled, np.float32(0.5)), [1])
    x = g.op("Abs", g.op("Sub", centres, np.arange(-2, source + 2, dtype=np.float32)))
    near, far = polynomial(g, x, a + 2, -a - 3, 0, 1), polynomial(g, x, a, -5 * a, 8 * a, -4 * a)
    within = lambda most: g.op("Less", x, np.float32(most))
    return g.op("Where", within(1), near, g.op("Where", within(2), far, np.float32(0)))


def polynomial(g: Graph, x: str, highest: float, *rest: float) -> str:
    """Of the coefficients from the highest power down, in float32."""
    value = np.full(1, highest, np.float32)
    for coefficient in rest:
        value = g.add(g.mul(value, x), np.float32(coefficient))
    return value


def stretched(g: Graph, config: Config, images: str) -> str:
    """Stretches images of any size, antialiased where that shrinks them."""
    return normalised(g, config, resized(g, images, np.array(config.image_size), ANTIALIASED))


def stretched_points(g: Graph, config: Config, points: str, original_size: str) -> str:
    """Scales points on from the frame that the image would fit."""
    width_first = g.op("Gather", fitted_size(g, config, original_size), np.array([1, 0]))
    return g.op("Div", g.mul(points, np.array(config.image_size[::-1], np.float32)), width_first)


def stretched_masks(g: Graph, config: Config, masks: str, original_size: str) -> str:
    """Resizes logits to the original size, bilinear."""
    return resized(g, masks, g.op("Cast", original_size, to=INT64), BILINEAR)


def resized(g: Graph, x: str, size: str | np.ndarray, how: dict) -> str:
    """Resizes [b, c, h, w] to `size`, int64 [2]."""
    return g.op("Resize", x, "", "", g.concat(g.sizes(x, 0, 2), size), **how)


WAYS = {
    Fitted: Way(padded, lambda g, config, points, original_size: points, cropped_masks),
    Squashed: Way(squashed, squashed_points, squashed_masks),
    Stretched: Way(stretched, stretched_points, stretched_masks),
}
