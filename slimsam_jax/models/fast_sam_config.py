"""The architecture of a FastSAM as data: widths, which pruning changes, of a network whose layout is fixed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from slimsam_jax.models.encoders.architecture import AsJson, check_width, check_widths

LARGEST_SIDE = 8192  # pixels of the model frame: of 64 million pixels the activations take 20 GB
MOST_BLOCKS = 64  # bottlenecks of a layer
STRIDES = (8, 16, 32)  # pixels of the frame to a cell, of the three levels of the head
STRIDE = STRIDES[-1]
BINS = 16  # of the distance from a cell to each side of a box
CONVS = (0, 1, 3, 5, 7, 16, 19)  # numbers of the layers that are one convolution
STAGES = (2, 4, 6, 8, 12, 15, 18, 21)  # of those that are a `Stage`; 9 is the pooling, the others have no parameters
SHORTCUTS = (2, 4, 6, 8)  # stages whose bottlenecks are residual: those of the backbone
JOINED = {11: 6, 14: 4, 17: 12, 20: 9}  # layers that join what is before them with an earlier one
LEVELS = (15, 18, 21)  # what the head reads


@dataclasses.dataclass(frozen=True)
class Stage:
    """Widths of a C2f layer: a convolution split in two, bottlenecks in a row on its second part, all joined.

    Attributes:
      first, second: channels of the two parts.
      blocks: (hidden, out) channels of each bottleneck; of a residual one `out` is `second`.
      out: channels of the convolution that joins them.

    Raises:
      ValueError: one is no width, or there is no block.
    """

    first: int
    second: int
    blocks: tuple[tuple[int, int], ...]
    out: int

    def __post_init__(self):
        check_widths(self, ("first", "second", "out"))
        if not isinstance(self.blocks, tuple) or not 1 <= len(self.blocks) <= MOST_BLOCKS:
            raise ValueError(f"a stage has 1 to {MOST_BLOCKS} blocks")
        check_tuples("blocks", self.blocks, len(self.blocks), 2)


@dataclasses.dataclass(frozen=True)
class Config(AsJson):
    """A FastSAM: YOLOv8-seg of one class. Pruning changes widths and nothing else.

    Attributes:
      image_size: the longer side of the model frame in pixels, a multiple of 32.
      convs: channels of the layers `CONVS`.
      stages: widths of the layers `STAGES`.
      pool: (hidden, out) channels of the pooling layer, SPPF.
      boxes, scores, coefficients: (first, second) hidden channels of the three branches of the head, of each level.
      prototypes: channels of the four layers that make the prototypes of masks; the last is their number.
      batch_norm: whether the tree has batch norms; False after `fold_batch_norm`.

    Raises:
      ValueError: a size out of range, or a residual bottleneck of another width than its stream.
    """

    image_size: int
    convs: tuple[int, ...]
    stages: tuple[Stage, ...]
    pool: tuple[int, int]
    boxes: tuple[tuple[int, int], ...]
    scores: tuple[tuple[int, int], ...]
    coefficients: tuple[tuple[int, int], ...]
    prototypes: tuple[int, int, int, int]
    batch_norm: bool = True

    def __post_init__(self):
        check_side(self.image_size)
        for name, count in (("convs", len(CONVS)), ("pool", 2), ("prototypes", 4)):
            check_tuples(name, (getattr(self, name),), 1, count)
        for name in ("boxes", "scores", "coefficients"):
            check_tuples(name, getattr(self, name), len(LEVELS), 2)
        if not isinstance(self.stages, tuple) or len(self.stages) != len(STAGES):
            raise ValueError(f"a FastSAM has {len(STAGES)} stages")
        for number, stage in zip(STAGES, self.stages, strict=True):
            if number in SHORTCUTS and any(out != stage.second for _, out in stage.blocks):
                raise ValueError(f"layer {number}: residual blocks of another width than their stream, {stage.second}")
        if type(self.batch_norm) is not bool:
            raise ValueError(f"batch_norm {self.batch_norm!r:.40} is neither true nor false")


def check_side(side: Any) -> None:
    """Raises ValueError unless `side` can be that of the model frame, in pixels."""
    if type(side) is not int or not STRIDE <= side <= LARGEST_SIDE or side % STRIDE:
        raise ValueError(f"image_size {side!r:.40} is one side in pixels, a multiple of {STRIDE} up to {LARGEST_SIDE}")


def check_tuples(name: str, rows: Any, count: int, length: int) -> None:
    """Raises ValueError unless `rows` are so many tuples of so many widths."""
    whole = isinstance(rows, tuple) and len(rows) == count
    if not whole or not all(isinstance(row, tuple) and len(row) == length for row in rows):
        raise ValueError(f"{name} of a FastSAM must be {count} x {length} widths, not {rows!r:.60}")
    for row in rows:
        for width in row:
            check_width(name, width)


def scaled(depth: float, width: float, most: int, image_size: int = 1024) -> Config:
    """An architecture of YOLOv8-seg's scale: multiples of depth and width, and the most channels before `width`."""
    wide = lambda channels: math.ceil(min(channels, most) * width / 8) * 8
    deep = lambda blocks: max(round(blocks * depth), 1)

    def stage(channels: int, blocks: int) -> Stage:
        out = wide(channels)
        return Stage(out // 2, out // 2, ((out // 2, out // 2),) * deep(blocks), out)

    kinds = ((128, 3), (256, 6), (512, 6), (1024, 3), (512, 3), (256, 3), (512, 3), (1024, 3))
    lowest, masks = wide(256), 32
    hidden = {"boxes": max(16, lowest // 4, 64), "scores": lowest, "coefficients": max(lowest // 4, masks)}
    return Config(
        image_size=image_size,
        convs=tuple(map(wide, (64, 128, 256, 512, 1024, 256, 512))),
        stages=tuple(stage(*kind) for kind in kinds),
        pool=(wide(1024) // 2, wide(1024)),
        prototypes=(wide(256), wide(256), wide(256), masks),
        **{name: ((channels, channels),) * len(LEVELS) for name, channels in hidden.items()},
    )


# (depth, width, most channels); FastSAM-s is s, FastSAM (also called FastSAM-x) is x
SCALES = {"n": (0.33, 0.25, 1024), "s": (0.33, 0.5, 1024), "m": (0.67, 0.75, 768), "l": (1, 1, 512)}
SCALES["x"] = (1, 1.25, 512)
PRESETS = {f"fast_sam_{name}": scaled(*scale) for name, scale in SCALES.items()}


def config_of(params: Mapping[str, Any], image_size: int = 1024) -> Config:
    """Reads the architecture off the shapes of a parameter tree.

    Args:
      params: of a FastSAM, arrays or shapes.
      image_size: the longer side of the model frame, which no shape tells.

    Raises:
      ValueError: the tree lacks an array, or its shapes fit no FastSAM.
    """
    try:
        branch = lambda name: tuple(
            tuple(outputs(params[f"{name}_{level}"][f"conv_{i}"]) for i in range(2)) for level in range(len(LEVELS))
        )
        layers = [params["prototypes"][name] for name in ("cv1", "upsample", "cv2", "cv3")]
        return Config(
            image_size=image_size,
            convs=tuple(outputs(params[f"layers_{number}"]) for number in CONVS),
            stages=tuple(stage_of(params[f"layers_{number}"]) for number in STAGES),
            pool=tuple(outputs(params["layers_9"][name]) for name in ("cv1", "cv2")),
            boxes=branch("boxes"),
            scores=branch("scores"),
            coefficients=branch("coefficients"),
            prototypes=tuple(map(outputs, layers)),
            batch_norm="bn" in params["layers_0"],
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not the parameters of a FastSAM: {error}") from None


def outputs(convolution: Mapping[str, Any]) -> int:
    """Output channels of a convolution's parameters."""
    return int(convolution["kernel"].shape[-1])


def stage_of(params: Mapping[str, Any]) -> Stage:
    """Widths of a C2f layer's parameters. What the first bottleneck reads is the second part."""
    count = sum(bool(re.fullmatch(r"blocks_\d+", name)) for name in params)
    blocks = [params[f"blocks_{i}"] for i in range(count)]
    second = int(blocks[0]["cv1"]["kernel"].shape[-2])
    widths = tuple((outputs(block["cv1"]), outputs(block["cv2"])) for block in blocks)
    return Stage(outputs(params["cv1"]) - second, second, widths, outputs(params["cv2"]))
