"""The architecture of a Hiera, SAM 2's image encoder, as data. `hiera` gives it out; see there."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from slimsam_jax.models.config import DEEPEST
from slimsam_jax.models.encoders.architecture import AsJson, Block, block_of, check_image_size, check_widths, pair

PATCH, KERNEL = 4, 7  # pixels of the image to a token of the first stage, and side of the patches, which overlap
STAGES = 4  # strides 4, 8, 16 and 32; masks are made of the first three


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one resolution. The first block of a later stage halves it: it reads the stage before.

    Attributes:
      dim: channels of its residual stream.
      window: side of the attention windows in tokens, of the next stage's first block, too; that of the first stage is
        also the side of the positions within a window.
      blocks: widths of its blocks.

    Raises:
      ValueError: no blocks, or a width out of range.
    """

    dim: int
    window: int
    blocks: tuple[Block, ...]

    def __post_init__(self):
        check_widths(self, ("dim", "window"))
        if not self.blocks:
            raise ValueError("a stage without blocks")


@dataclasses.dataclass(frozen=True)
class Config(AsJson):
    """The image encoder. Pruning changes widths and nothing else.

    Attributes:
      image_size: (height, width) of the model frame in pixels, multiples of 32 and of a window of the first stage.
      stages: four, in their order.
      global_blocks: places of the blocks whose tokens all attend to each other, counted through all stages.
      pos_grid: (rows, columns) of the learnt positions, which are resized to the first stage's grid.
      out_chans: channels C of the image embedding, a multiple of 8; the finer maps have C / 4 and C / 8.

    Raises:
      ValueError: a size out of range, or an odd window whose tokens would be pooled by twos.
    """

    image_size: tuple[int, int]
    stages: tuple[Stage, ...]
    global_blocks: tuple[int, ...]
    pos_grid: tuple[int, int] = (7, 7)
    out_chans: int = 256

    MAPS: ClassVar = 3

    def __post_init__(self):
        check_widths(self, ("out_chans",))
        if len(self.stages) != STAGES or self.depth > DEEPEST:
            raise ValueError(f"{self.depth} blocks in {len(self.stages)} stages: {STAGES} and at most {DEEPEST} blocks")
        if self.out_chans % 8:
            raise ValueError(f"out_chans {self.out_chans} must be a multiple of 8")
        check_image_size(self.image_size, math.lcm(32, PATCH * self.stages[0].window))
        if len(self.pos_grid) != 2 or any(type(side) is not int or not 1 <= side <= 1024 for side in self.pos_grid):
            raise ValueError(f"pos_grid {self.pos_grid!r:.40} must be rows and columns, 1 to 1024")
        many = len(self.global_blocks) > self.depth
        if many or any(type(i) is not int or not 0 <= i < self.depth for i in self.global_blocks):
            raise ValueError(f"global_blocks {self.global_blocks!r:.60} are no places among {self.depth} blocks")
        for stage, first in zip(self.stages, self.firsts[1:], strict=False):
            if stage.window % 2 and first not in self.global_blocks:
                raise ValueError(f"a window of {stage.window} tokens, which the next stage pools by twos, must be even")

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(len(stage.blocks) for stage in self.stages)

    @property
    def firsts(self) -> tuple[int, ...]:
        """Place of each stage's first block among all."""
        return tuple(itertools.accumulate((len(stage.blocks) for stage in self.stages[:-1]), initial=0))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of tokens of every stage."""
        height, width = self.image_size
        return tuple((height // (PATCH << i), width // (PATCH << i)) for i in range(STAGES))

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the image embedding, which is the third stage's."""
        return self.grids[2]

    @property
    def high_res_dims(self) -> tuple[int, int]:
        """Channels of the maps of strides 4 and 8."""
        return self.out_chans // 8, self.out_chans // 4


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands.

    Attributes:
      stage: its stage, from 0.
      pools: whether it is the first of a later stage, and halves the grid.
      window: side of its windows in tokens before that; 0 if all tokens attend to each other.
      grid: (rows, columns) of its tokens before that.
      inputs, dim: channels of the stream before and behind it.
      block: its widths.
    """

    stage: int
    pools: bool
    window: int
    grid: tuple[int, int]
    inputs: int
    dim: int
    block: Block


def places(config: Config) -> list[Place]:
    """Every block's, in their order."""
    found: list[Place] = []
    for i, stage in enumerate(config.stages):
        for j, block in enumerate(stage.blocks):
            pools = j == 0 and i > 0
            source = config.stages[i - pools]  # the first block is windowed as the stage that it reads
            window = 0 if len(found) in config.global_blocks else source.window
            found.append(Place(i, pools, window, config.grids[i - pools], source.dim, stage.dim, block))
    return found


def uniform(
    embed_dim: int,
    num_heads: int,
    depths: Sequence[int],
    global_blocks: Sequence[int],
    windows: Sequence[int] = (8, 4, 14, 7),
    pos_grid: tuple[int, int] = (7, 7),
    image_size: int | tuple[int, int] = 1024,
) -> Config:
    """An architecture by the arguments of the original's class: widths and heads double from stage to stage."""
    stages = []
    for i, (depth, window) in enumerate(zip(depths, windows, strict=True)):
        dim, heads = embed_dim << i, num_heads << i
        block = Block(heads, dim // heads, dim // heads, 4 * dim)
        stages.append(Stage(dim, window, (block,) * depth))
    return Config(pair(image_size), tuple(stages), tuple(global_blocks), tuple(pos_grid))


def narrowed(config: Config, narrow: Callable[[int], int]) -> Config:
    """The architecture with every width of streams and bottlenecks by `narrow`."""
    widths = ("key_dim", "value_dim", "mlp_dim")
    of = lambda block: dataclasses.replace(block, **{name: narrow(getattr(block, name)) for name in widths})
    stages = [
        dataclasses.replace(stage, dim=narrow(stage.dim), blocks=tuple(map(of, stage.blocks)))
        for stage in config.stages
    ]
    return dataclasses.replace(config, stages=tuple(stages))


# sam2/configs/sam2.1/*.yaml
PRESETS = {
    "sam2_tiny": uniform(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "sam2_small": uniform(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "sam2_base_plus": uniform(112, 2, (2, 3, 16, 3), (12, 16, 20), pos_grid=(14, 14)),
    "sam2_large": uniform(144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
}


def config_of(
    params: Mapping[str, Any],
    image_size: int | tuple[int, int] = 1024,
    windows: Sequence[int] = (8, 4, 14, 7),
    global_blocks: Collection[int] = (),
    like: Config | None = None,
) -> Config:
    """Reads the architecture off the shapes of a parameter tree.

    Args:
      params: of an `ImageEncoder`, arrays or shapes.
      image_size: pixels, one side or (height, width), which no shape tells: positions are resized to it.
      windows: of the four stages, of which shapes tell the first alone.
      global_blocks: which no shape tells either.
      like: another architecture that has these three.

    Raises:
      ValueError: the tree lacks an array, or its image size fits none.
    """
    if like is not None:
        image_size, global_blocks = like.image_size, like.global_blocks
        windows = [stage.window for stage in like.stages]
    try:
        count = sum(bool(re.fullmatch(r"blocks_\d+", name)) for name in params)
        blocks = [params[f"blocks_{i}"] for i in range(count)]
        if "patch_embed_proj" not in params:
            raise KeyError("patch_embed_proj")
        firsts = [0, *(i for i, block in enumerate(blocks) if "proj" in block)]
        ends = [*firsts[1:], count]
        if len(windows) != len(firsts) or params["pos_embed_window"].shape[0] != windows[0]:
            raise ValueError(f"windows {tuple(windows)!r:.60} are not those of its {len(firsts)} stages")
        return Config(
            image_size=pair(image_size),
            stages=tuple(
                _stage_of(blocks[first:end], window) for first, end, window in zip(firsts, ends, windows, strict=True)
            ),
            global_blocks=tuple(global_blocks),
            pos_grid=tuple(params["pos_embed"].shape[:2]),
            out_chans=params["neck_0"]["kernel"].shape[-1],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the parameters of a Hiera: {error}") from None


def _stage_of(blocks: Sequence[Mapping[str, Any]], window: int) -> Stage:
    widths = tuple(block_of(block["attn"], block["mlp_lin1"]["kernel"].shape[1]) for block in blocks)
    return Stage(blocks[0]["mlp_lin2"]["kernel"].shape[1], window, widths)
