"""Converts a FastSAM to ONNX, suppression outside. `python -m converters.onnx.fast_sam MODEL FILE.onnx`.

The graph takes letterboxed images and gives boxes, scores, coefficients and prototypes; what is left is
`inference.fast_sam_boxes` and `inference.fast_sam_masks`, which are numpy alone.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tyro.conf import Positional

from slimsam_jax import cli
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.models.fast_sam_config import BINS, CONVS, JOINED, LEVELS, SHORTCUTS, STAGES, STRIDE, STRIDES

if TYPE_CHECKING:
    import onnx

    from converters.onnx.graph import Graph
    from slimsam_jax.models.fast_sam import FastSam

# What needs JAX or onnx is imported where it is used: --help should not wait for it.

LARGEST_ERROR = 1e-4  # of float32, relative to the largest value; a wrong graph gives 1e-1
OUTPUTS = ("boxes", "scores", "coefficients", "prototypes")


def build(model: FastSam) -> onnx.ModelProto:
    """Makes the graph.

    Input: images, uint8 [b, 3, H, W], RGB, letterboxed, sides multiples of 32. Outputs, float32, of n cells: boxes
    [b, n, 4] x0, y0, x1, y1 in pixels of the frame, scores [b, n] in 0..1, coefficients [b, n, m] and prototypes
    [b, m, H / 4, W / 4].
    """
    import flax.traverse_util

    from converters.onnx.graph import FLOAT, UINT8, Graph
    from slimsam_jax.models.fast_sam import folded

    model = folded(model)
    flat = flax.traverse_util.flatten_dict(model.params, sep="/")
    g = Graph({path: np.asarray(array) for path, array in flat.items()})
    read = backbone(g, model, g.mul(g.op("Cast", "images", to=FLOAT), np.float32(1 / 255)))
    levels = [level(g, x, i, stride) for i, (x, stride) in enumerate(zip(read, STRIDES, strict=True))]
    boxes, scores, coefficients = (g.concat(*parts, axis=1) for parts in zip(*levels, strict=True))
    count = model.config.prototypes[-1]
    outputs = {
        "boxes": (boxes, ("batch", "cells", 4)),
        "scores": (scores, ("batch", "cells")),
        "coefficients": (coefficients, ("batch", "cells", count)),
        "prototypes": (prototypes(g, read[0]), ("batch", count, "height_4", "width_4")),
    }
    return g.model("fast_sam", model.config, {"images": (UINT8, ("batch", 3, "height", "width"))}, outputs)


def backbone(g: Graph, model: FastSam, x: str) -> list[str]:
    """The layers up to what the head reads, [b, c, h, w] each."""
    given = {}
    for number in range(LEVELS[-1] + 1):
        path = f"layers_{number}"
        if number in CONVS:
            x = conv(g, x, path, stride=2)
        elif number in STAGES:
            stage = model.config.stages[STAGES.index(number)]
            x = c2f(g, x, path, (stage.first, stage.second), len(stage.blocks), number in SHORTCUTS)
        elif number in JOINED:
            x = g.concat(x, given[JOINED[number]], axis=1)
        elif number == 9:
            x = pool(g, x, path)
        else:
            scales = np.float32([1, 1, 2, 2])
            modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            x = g.op("Resize", x, "", scales, mode="nearest", **modes)
        given[number] = x
    return [given[number] for number in LEVELS]


def conv(g: Graph, x: str, path: str, stride: int = 1, silu: bool = True) -> str:
    """A convolution with bias and SiLU, padded by half of the kernel."""
    kernel = g.params[f"{path}/kernel"]
    kernel = kernel.T[..., None, None] if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
    operands = x, g.constant(np.ascontiguousarray(kernel), f"{path}/kernel"), g.param(f"{path}/bias")
    pads = [kernel.shape[-1] // 2] * 4
    y = g.op("Conv", *operands, name=path, kernel_shape=kernel.shape[2:], strides=[stride] * 2, pads=pads)
    return g.mul(y, g.op("Sigmoid", y)) if silu else y


def c2f(g: Graph, x: str, path: str, widths: tuple[int, int], blocks: int, shortcut: bool) -> str:
    """See `models.fast_sam_layers.C2f`."""
    split, ends = conv(g, x, f"{path}/cv1"), (0, widths[0], sum(widths))
    parts = [g.op("Slice", split, [a], [b], [1]) for a, b in itertools.pairwise(ends)]
    for i in range(blocks):
        y = conv(g, conv(g, parts[-1], f"{path}/blocks_{i}/cv1"), f"{path}/blocks_{i}/cv2")
        parts.append(g.add(parts[-1], y) if shortcut else y)
    return conv(g, g.concat(*parts, axis=1), f"{path}/cv2")


def pool(g: Graph, x: str, path: str) -> str:
    """See `models.fast_sam_layers.Pool`."""
    parts = [conv(g, x, f"{path}/cv1")]
    for _ in range(3):
        parts.append(g.op("MaxPool", parts[-1], kernel_shape=[5, 5], strides=[1, 1], pads=[2] * 4))
    return conv(g, g.concat(*parts, axis=1), f"{path}/cv2")


def prototypes(g: Graph, x: str) -> str:
    """See `models.fast_sam_layers.Prototypes`."""
    x, path = conv(g, x, "prototypes/cv1"), "prototypes/upsample"
    kernel = g.constant(np.ascontiguousarray(g.params[f"{path}/kernel"].transpose(2, 3, 0, 1)), f"{path}/kernel")
    sizes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    x = g.op("ConvTranspose", x, kernel, g.param(f"{path}/bias"), name=path, **sizes)
    return conv(g, conv(g, x, "prototypes/cv2"), "prototypes/cv3")


def level(g: Graph, x: str, index: int, stride: int) -> tuple[str, str, str]:
    """Boxes [b, cells, 4], scores [b, cells] and coefficients [b, cells, m] of a level of the head."""

    def branch(name: str) -> str:
        y = conv(g, conv(g, x, f"{name}_{index}/conv_0"), f"{name}_{index}/conv_1")
        return conv(g, y, f"{name}_{index}/out", silu=False)

    flat = lambda y, width: g.transpose(g.reshape(y, 0, width, -1), 0, 2, 1)
    logits = g.transpose(g.reshape(branch("boxes"), 0, 4, BINS, -1), 0, 3, 1, 2)
    distances = g.op("MatMul", g.op("Softmax", logits, axis=-1), np.arange(BINS, dtype=np.float32))
    low, high = (g.op("Slice", distances, [a], [a + 2], [2]) for a in (0, 2))
    cells = centres(g, x)
    corners = g.concat(g.op("Sub", cells, low), g.add(cells, high), axis=2)
    count = g.params[f"coefficients_{index}/out/kernel"].shape[-1]
    scores = g.reshape(g.op("Sigmoid", branch("scores")), 0, -1)
    return g.mul(corners, np.float32(stride)), scores, flat(branch("coefficients"), count)


def centres(g: Graph, x: str) -> str:
    """(x, y) of the centres of the cells of [b, c, h, w], row by row, [h * w, 2]."""
    half = np.float32(0.5)
    steps = []
    for axis in (3, 2):
        side = g.op("Squeeze", g.sizes(x, axis, axis + 1))
        steps.append(g.add(g.op("Cast", g.op("Range", np.int64(0), side, np.int64(1)), to=1), half))
    grid = g.sizes(x, 2, 4)
    columns = g.op("Expand", g.reshape(steps[0], 1, -1), grid)
    rows = g.op("Expand", g.reshape(steps[1], -1, 1), grid)
    return g.concat(g.reshape(columns, -1, 1), g.reshape(rows, -1, 1), axis=1)


def errors(model: FastSam, path: Path, images: np.ndarray) -> dict[str, float]:
    """Largest differences from JAX of each output, relative to its largest value.

    Args:
      path: of the ONNX file.
      images: [b, H, W, 3] uint8, letterboxed.
    """
    import onnxruntime

    from slimsam_jax.models.fast_sam import detect

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images.transpose(0, 3, 1, 2)}), strict=True))
    decoded, prototypes = map(np.asarray, detect(model.config, model.params, images))
    half = decoded[..., 2:4] / 2
    boxes = np.concatenate([decoded[..., :2] - half, decoded[..., :2] + half], axis=-1)
    wanted = (boxes, decoded[..., 4], decoded[..., 5:], prototypes.transpose(0, 3, 1, 2))
    return {
        name: float(np.abs(given[name] - array).max() / np.abs(array).max())
        for name, array in zip(OUTPUTS, wanted, strict=True)
    }


def write(model: FastSam, path: Path, images: np.ndarray) -> dict[str, float]:
    """Writes the file, checked; returns `errors`.

    Raises:
      RunError: it differs from JAX by more than `LARGEST_ERROR`, or a value is not finite; nothing is written.
    """
    from converters.to_onnx import save
    from slimsam_jax.files import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save(build(model), Path(temporary))
        found = errors(model, Path(temporary), images)
        if not max(found.values()) <= LARGEST_ERROR:
            raise RunError(f"the ONNX model differs from JAX: {found}; nothing is written")
    return found


def main(source: Positional[Path], file: Positional[Path], image: Path | None = None) -> None:
    """Convert a FastSAM into an ONNX file, and check it against JAX with onnxruntime.

    Args:
      source: a model folder or FastSAM's .pt.
      file: the .onnx to write; must not exist.
      image: the image to check with; one of ours if not given.
    """
    if file.suffix != ".onnx" or file.exists():
        raise InputError(f"{file} must end in .onnx, and not exist yet")
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"writing ONNX needs {' and '.join(missing)}: pip install onnx onnxruntime")
    from converters.from_torch import load
    from slimsam_jax import data
    from slimsam_jax.imaging.letterbox import fit, letterbox
    from slimsam_jax.models.fast_sam import FastSam

    model = load(source)
    if not isinstance(model, FastSam):
        raise InputError(f"{source} is no FastSAM; python -m converters.to_onnx writes the other models")
    photo = data.read_image(image or data.embedded_images() / "dog.jpg")
    place = fit((photo.height, photo.width), model.config.image_size, stride=STRIDE)
    found = write(model, file, letterbox(np.asarray(photo), place)[None])
    worst = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    print(f"wrote {file}; largest error relative to the largest value: {worst}")


if __name__ == "__main__":
    cli.run(main)
