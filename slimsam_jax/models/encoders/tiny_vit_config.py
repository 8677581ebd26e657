"""The architecture of a TinyViT as data. `tiny_vit` gives it out; see there."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimsam_jax.models.config import DEEPEST
from slimsam_jax.models.encoders.architecture import (
    AsJson,
    Block,
    block_of,
    check_image_size,
    check_width,
    check_widths,
    pair,
)

MOST_STAGES = 8
PATCH = 4  # pixels of the image to a pixel of the first stage


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of attention blocks, and the downsampling that leads to it.

    Attributes:
      dim: channels of its residual stream.
      window: side of the attention windows in tokens.
      blocks: widths of its blocks.
      entry_dim: hidden channels of the downsampling.
      stride: of the downsampling, 1 or 2. The original has it from `dim` (`original_stride`), which pruning changes.
    """

    dim: int
    window: int
    blocks: tuple[Block, ...]
    entry_dim: int
    stride: int

    def __post_init__(self):
        check_widths(self, ("dim", "window", "entry_dim", "stride"))
        if self.stride > 2 or not self.blocks:
            raise ValueError(f"a stage of {len(self.blocks)} blocks and stride {self.stride}: 1 or 2, and some blocks")


@dataclasses.dataclass(frozen=True)
class Config(AsJson):
    """The image encoder. Pruning changes widths and nothing else.

    Attributes:
      image_size: (height, width) of the model frame in pixels, multiples of `stride`.
      stem_dim: channels between the two convolutions of the patch embedding.
      conv_dim: channels of the convolutional stage's residual stream.
      conv_blocks: hidden channels of each of its blocks.
      stages: of attention, in their order.
      out_chans: channels of the image embedding.
      batch_norm: whether the tree has batch norms; False after `fold_batch_norm`.

    Raises:
      ValueError: a size out of range.
    """

    image_size: tuple[int, int]
    stem_dim: int
    conv_dim: int
    conv_blocks: tuple[int, ...]
    stages: tuple[Stage, ...]
    out_chans: int = 256
    batch_norm: bool = True

    def __post_init__(self):
        check_widths(self, ("stem_dim", "conv_dim", "out_chans"))
        for hidden in self.conv_blocks:
            check_width("conv_blocks", hidden)
        depth = len(self.conv_blocks) + sum(len(stage.blocks) for stage in self.stages)
        if not (self.conv_blocks and 1 <= len(self.stages) <= MOST_STAGES and depth <= DEEPEST):
            raise ValueError(
                f"{depth} blocks in {len(self.stages)} stages of attention, and at most {DEEPEST} in 1 to 8"
            )
        if type(self.batch_norm) is not bool:
            raise ValueError(f"batch_norm {self.batch_norm!r:.40} is neither true nor false")
        check_image_size(self.image_size, self.stride)

    @property
    def stride(self) -> int:
        """Pixels of the image to a token of the embedding, in either direction."""
        return PATCH * math.prod(stage.stride for stage in self.stages)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of every stage, the convolutional first."""
        grids = [(self.image_size[0] // PATCH, self.image_size[1] // PATCH)]
        for stage in self.stages:
            grids.append((grids[-1][0] // stage.stride, grids[-1][1] // stage.stride))
        return tuple(grids)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the embedding."""
        return self.grids[-1]


def original_stride(dim: int) -> int:
    """Of the downsampling to so many channels, in the original's class."""
    return 1 if dim in (320, 448, 576) else 2


def uniform(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    windows: Sequence[int],
    mlp_ratio: float = 4.0,
    expansion: float = 4.0,
    image_size: int | tuple[int, int] = 1024,
) -> Config:
    """An architecture by the arguments of the original's class, a number for each stage, the convolutional first."""
    stages = []
    for dim, depth, n, window in list(zip(dims, depths, heads, windows, strict=True))[1:]:
        block = Block(n, dim // n, dim // n, int(dim * mlp_ratio))
        stages.append(Stage(dim, window, (block,) * depth, dim, original_stride(dim)))
    return Config(pair(image_size), dims[0] // 2, dims[0], (int(dims[0] * expansion),) * depths[0], tuple(stages))


def narrowed(config: Config, narrow: Callable[[int], int]) -> Config:
    """The architecture with every width of streams and bottlenecks by `narrow`."""
    few = lambda record, *names: dataclasses.replace(record, **{name: narrow(getattr(record, name)) for name in names})
    block = lambda block: few(block, "key_dim", "value_dim", "mlp_dim")
    stages = [
        dataclasses.replace(few(stage, "dim", "entry_dim"), blocks=tuple(map(block, stage.blocks)))
        for stage in config.stages
    ]
    hidden = tuple(map(narrow, config.conv_blocks))
    return dataclasses.replace(few(config, "stem_dim", "conv_dim"), conv_blocks=hidden, stages=tuple(stages))


# mobile_sam/build_sam.py and tinysam/build_sam.py, build_sam_vit_t
PRESETS = {"vit_t": uniform((64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7))}


def config_of(
    params: Mapping[str, Any],
    image_size: int | tuple[int, int] = 1024,
    strides: Sequence[int] | None = None,
    like: Config | None = None,
) -> Config:
    """Reads the architecture off the shapes of a parameter tree.

    Args:
      params: of an `ImageEncoder`, arrays or shapes.
      image_size: pixels, one side or (height, width), which no shape tells: there are no absolute positions.
      strides: of the downsamplings, which none tells either; None for the published ones: 2, and 1 for the last.
      like: another architecture that has both.

    Raises:
      ValueError: the tree lacks an array, or its image size fits none.
    """
    if like is not None:
        image_size, strides = like.image_size, [stage.stride for stage in like.stages]
    try:
        stem, tails = params["patch_embed_0"], _numbered(params, "layers_")[1:]
        heads = [part["downsample"] for part in _numbered(params, "layers_")[:-1]]
        strides = (2,) * (len(tails) - 1) + (1,) if strides is None else tuple(strides)
        if len(strides) != len(tails):
            raise ValueError(f"strides {strides!r:.40} are not one for each of {len(tails)} downsamplings")
        return Config(
            image_size=pair(image_size),
            stem_dim=stem["kernel"].shape[-1],
            conv_dim=params["patch_embed_2"]["kernel"].shape[-1],
            conv_blocks=tuple(b["conv1"]["kernel"].shape[-1] for b in _numbered(params["layers_0"], "blocks_")),
            stages=tuple(_stage_of(*parts) for parts in zip(tails, heads, strides, strict=True)),
            out_chans=params["neck_0"]["kernel"].shape[-1],
            batch_norm="bn" in stem,
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not the parameters of a TinyViT: {error}") from None


def _numbered(params: Mapping[str, Any], prefix: str) -> list[Any]:
    """The subtrees prefix0, prefix1 ..., in order."""
    count = sum(bool(re.fullmatch(rf"{prefix}\d+", name)) for name in params)
    return [params[f"{prefix}{i}"] for i in range(count)]


def _stage_of(stage: Mapping[str, Any], entry: Mapping[str, Any], stride: int) -> Stage:
    blocks = _numbered(stage, "blocks_")
    return Stage(
        dim=entry["conv3"]["kernel"].shape[-1],
        window=blocks[0]["attn"]["attention_biases"].shape[1],
        blocks=tuple(block_of(block["attn"], block["mlp"]["fc1"]["kernel"].shape[1]) for block in blocks),
        entry_dim=entry["conv1"]["kernel"].shape[-1],
        stride=stride,
    )
