"""The architecture of a RepViT as data. `rep_vit` gives it out; see there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slimsam_jax.models.config import DEEPEST, WIDEST
from slimsam_jax.models.encoders.architecture import AsJson, check_image_size, check_width, check_widths, pair

STAGES = 4  # at strides of 4, 8, 16 and 32 pixels; the embedding joins the last two
EMBEDDING_STRIDE, COARSEST_STRIDE = 16, 32


@dataclasses.dataclass(frozen=True)
class Block:
    """Widths of a block besides its stage's.

    Attributes:
      hidden: channels of the channel mixer's hidden layer.
      squeezed: channels of squeeze-excite's; 0 for a block without it.
    """

    hidden: int
    squeezed: int = 0

    def __post_init__(self):
        check_width("hidden", self.hidden)
        if type(self.squeezed) is not int or not 0 <= self.squeezed <= WIDEST:
            raise ValueError(f"squeezed {self.squeezed!r:.40} is no whole number from 0 to {WIDEST}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one width; the first of every stage but the first halves rows and columns.

    Attributes:
      dim: channels of its residual stream.
      blocks: widths of its blocks.
    """

    dim: int
    blocks: tuple[Block, ...]

    def __post_init__(self):
        check_widths(self, ("dim",))
        if not self.blocks:
            raise ValueError("a stage of no blocks")


@dataclasses.dataclass(frozen=True)
class Config(AsJson):
    """The image encoder. Pruning changes widths and nothing else.

    Attributes:
      image_size: (height, width) of the model frame in pixels, multiples of 32.
      stem_dim: channels between the stem's two convolutions.
      stages: four, from fine to coarse.
      fuse_dim: channels of the sum of the last two stages.
      out_chans: channels of the image embedding.
      batch_norm: whether the tree has batch norms and the branches of training; False after `fold_batch_norm`.

    Raises:
      ValueError: a size out of range.
    """

    image_size: tuple[int, int]
    stem_dim: int
    stages: tuple[Stage, ...]
    fuse_dim: int = 256
    out_chans: int = 256
    batch_norm: bool = True

    def __post_init__(self):
        check_widths(self, ("stem_dim", "fuse_dim", "out_chans"))
        depth = sum(len(stage.blocks) for stage in self.stages)
        if len(self.stages) != STAGES or depth > DEEPEST:
            raise ValueError(
                f"{depth} blocks in {len(self.stages)} stages, and {STAGES} of at most {DEEPEST} are taken"
            )
        if type(self.batch_norm) is not bool:
            raise ValueError(f"batch_norm {self.batch_norm!r:.40} is neither true nor false")
        check_image_size(self.image_size, COARSEST_STRIDE)

    @property
    def stride(self) -> int:
        """Pixels of the image to a token of the embedding, in either direction."""
        return EMBEDDING_STRIDE

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of every stage."""
        height, width = self.image_size
        return tuple((height // stride, width // stride) for stride in (4, 8, 16, 32))

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the embedding."""
        return self.grids[2]


def squeezed_dim(dim: int) -> int:
    """Of squeeze-excite in the published models: a quarter, rounded to the next multiple of 8, halves up."""
    return max(8, int(dim / 4 + 4) // 8 * 8)


def uniform(
    dims: Sequence[int],
    squeezes: Sequence[Sequence[bool]],
    image_size: int | tuple[int, int] = 1024,
) -> Config:
    """An architecture whose other widths follow from its stages', as in the published models.

    Args:
      dims: widths of the stages.
      squeezes: for each block of each stage, whether it has squeeze-excite; a strided block has it at the width before.
    """
    stages = []
    for i, (dim, flags) in enumerate(zip(dims, squeezes, strict=True)):
        widths = [dims[i - 1] if i and not j else dim for j in range(len(flags))]
        squeezed = (squeezed_dim(width) if flag else 0 for width, flag in zip(widths, flags, strict=True))
        stages.append(Stage(dim, tuple(Block(2 * dim, each) for each in squeezed)))
    return Config(pair(image_size), dims[0] // 2, tuple(stages))


_EVERY_OTHER = (False, *(i % 2 == 0 for i in range(14)), False)
PRESETS = {
    "rep_vit_m1": uniform(
        (48, 96, 192, 384), ((True, False, False), (False, True, False, False), _EVERY_OTHER, (False, True, False))
    )
}


def config_of(
    params: Mapping[str, Any], image_size: int | tuple[int, int] = 1024, like: Config | None = None
) -> Config:
    """Reads the architecture off the shapes of a parameter tree.

    Args:
      params: of an `ImageEncoder`, arrays or shapes.
      image_size: pixels, one side or (height, width), which no shape tells: there are no positions.
      like: another architecture that has it.

    Raises:
      ValueError: the tree lacks an array, or its image size fits none.
    """
    try:
        return Config(
            image_size=pair(image_size) if like is None else like.image_size,
            stem_dim=params["stem_0"]["kernel"].shape[-1],
            stages=tuple(_stage_of(params[f"stages_{i}"]) for i in range(STAGES)),
            fuse_dim=params["fuse_2"]["kernel"].shape[-1],
            out_chans=params["neck_0"]["kernel"].shape[-1],
            batch_norm="bn" in params["stem_0"],
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not the parameters of a RepViT: {error}") from None


def _stage_of(stage: Mapping[str, Any]) -> Stage:
    count = sum(bool(re.fullmatch(r"blocks_\d+", name)) for name in stage)
    blocks = [stage[f"blocks_{i}"] for i in range(count)]
    widths = [(b["mixer_0"]["kernel"].shape[-1], _squeezed(b)) for b in blocks]
    return Stage(blocks[0]["mixer_2"]["kernel"].shape[-1], tuple(Block(*each) for each in widths))


def _squeezed(block: Mapping[str, Any]) -> int:
    return block["squeeze"]["fc1"]["kernel"].shape[-1] if "squeeze" in block else 0
