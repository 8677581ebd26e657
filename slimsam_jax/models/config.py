"""The architecture as data: everything that fixes the shapes of a SAM, and nothing that does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from slimsam_jax.imaging.frames import Fitted

GLOBAL = 0  # the `window` of a block whose tokens all attend to each other
# Bounds far beyond any SAM (SAM-H: 5120 wide, 32 blocks), so that nothing is built that a file merely asks for.
WIDEST, DEEPEST, MOST_LAYERS = 1 << 16, 128, 32
MOST_PIXELS = 1 << 26  # of the model frame: 8192 x 8192, whose activations take tens of GB


@dataclasses.dataclass(frozen=True)
class Block:
    """Widths of one transformer block of the image encoder.

    Attributes:
      heads: attention heads.
      head_dim: channels of q, k and v in each head.
      mlp_dim: hidden width of the MLP.
      window: side of the attention window in tokens, or `GLOBAL` (0).

    Raises:
      ValueError: a width below 1, or beyond `WIDEST`.
    """

    heads: int
    head_dim: int
    mlp_dim: int
    window: int

    def __post_init__(self):
        widths = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, width in widths.items():
            if type(width) is not int or not (name != "window") <= width <= WIDEST:
                raise ValueError(f"{name} {width!r:.40} is not the width of a block, 1 to {WIDEST}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A SAM. Pruning changes `embed_dim` and the widths in `blocks`, nothing else.

    Attributes:
      image_size: (height, width) of the model frame in pixels, multiples of `patch_size`.
      embed_dim: width D of the image encoder's residual stream.
      blocks: one `Block` per transformer block.
      patch_size: side of a patch in pixels.
      out_chans: channels of the image embedding (and width of the mask decoder).
      mask_in_chans: channels after the last strided convolution of a mask prompt.
      decoder_heads, decoder_mlp_dim, decoder_depth: the two-way transformer.
      multimask_outputs: masks returned for an ambiguous prompt, besides the single one.
      iou_head_dim: hidden width of the IoU head.
      pixel_mean, pixel_std: per channel (RGB), in units of 0..255.
    """

    image_size: tuple[int, int]
    embed_dim: int
    blocks: tuple[Block, ...]
    patch_size: int = 16
    out_chans: int = 256
    mask_in_chans: int = 16
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    decoder_depth: int = 2
    multimask_outputs: int = 3
    iou_head_dim: int = 256
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self):
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        # 0 blocks of width 0: the decoder's architecture alone (`sam.decode`).
        bounds = {"embed_dim": (0, WIDEST), "decoder_depth": (0, MOST_LAYERS), "multimask_outputs": (0, MOST_LAYERS)}
        for name, size in sizes.items():
            least, most = bounds.get(name, (4 if name == "mask_in_chans" else 1, WIDEST))
            if type(size) is not int or not least <= size <= most:
                raise ValueError(f"{name} {size!r:.40} is no whole number from {least} to {most}")
        if len(self.blocks) > DEEPEST:
            raise ValueError(f"{len(self.blocks)} blocks, and at most {DEEPEST} are taken")
        if len(self.image_size) != 2 or any(type(s) is not int or not 0 < s <= WIDEST for s in self.image_size):
            raise ValueError(f"image_size {self.image_size!r:.40} must be (height, width) in pixels, at most {WIDEST}")
        check_pixels(self.image_size)
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} must be multiples of the patch size {self.patch_size}")
        if self.out_chans % 8 or self.out_chans % (2 * self.decoder_heads):
            raise ValueError(f"out_chans {self.out_chans} must be a multiple of 8 and of twice the decoder's heads")
        check_pixel_statistics(self.pixel_mean, self.pixel_std)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patch tokens, which is also the size of the image embedding."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def frame(self) -> Fitted:
        """How images come into the model frame."""
        return Fitted(self.image_size)

    @property
    def point_tokens(self) -> int:
        """Tokens of a prompt that is one point: itself and the padding."""
        return 2

    @property
    def uniform(self) -> bool:
        """True if stock `segment_anything` can hold it: equal blocks, heads * head_dim == embed_dim."""
        widths = {(b.heads * b.head_dim, b.heads, b.mlp_dim) for b in self.blocks}
        windows = {b.window for b in self.blocks} - {GLOBAL}
        return len(widths) == 1 and len(windows) <= 1 and next(iter(widths))[0] == self.embed_dim

    @property
    def single_mask(self) -> bool:
        """Whether the decoder's first mask is for use, as SAM's is; see `composed.SamConfig`."""
        return True

    @property
    def encoder(self) -> Config:
        """The image encoder's architecture: of a ViT the record itself, as model folders have had it from the start."""
        return self

    @property
    def head(self) -> Config:
        """Prompt encoder and mask decoder alone, which a teacher shares with its slim models."""
        return dataclasses.replace(self, embed_dim=0, blocks=())

    def with_encoder(self, encoder: Config) -> Config:
        """The same SAM with an encoder of other widths."""
        return dataclasses.replace(self, embed_dim=encoder.embed_dim, blocks=encoder.blocks)

    def attention_span(self, block: Block) -> tuple[int, int]:
        """(rows, columns) of the tokens that one token of this block attends to."""
        return self.grid if block.window == GLOBAL else (block.window, block.window)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], blocks: bool = True) -> Config:
        """Inverse of `to_json` (JSON turns tuples into lists).

        Args:
          blocks: whether there must be some, as there must but in a head.

        Raises:
          ValueError: an unknown or missing field, or one out of range.
        """
        try:
            found = tuple(Block(**block) for block in fields["blocks"][: DEEPEST + 1])
            if bool(found) is not blocks:
                raise ValueError("blocks without an encoder" if found else "no blocks")
            tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**{**tuples, "blocks": found})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an architecture of slimsam_jax: {error}") from None


def check_pixels(image_size: tuple[int, int]) -> None:
    """Raises ValueError for a model frame of more than `MOST_PIXELS`."""
    if math.prod(image_size) > MOST_PIXELS:
        raise ValueError(f"image_size {tuple(image_size)} has more than {MOST_PIXELS} pixels, the most that are taken")


def check_pixel_statistics(mean: Any, std: Any) -> None:
    """Raises ValueError unless they are three numbers each, one per channel."""
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        numbers = all(isinstance(v, int | float) and type(v) is not bool and abs(v) < 1e6 for v in values)
        if len(values) != 3 or not numbers or (name == "pixel_std" and min(values) <= 0):
            raise ValueError(f"{name} {values!r:.40} must be three numbers, one per channel")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What a mask of everything mode must reach to be kept. They belong to a model, as its scores mean what it learned.

    The names are `SamAutomaticMaskGenerator`'s, the defaults Segment Anything's, which suit SAM-H.

    Attributes:
      pred_iou_thresh: the model's own estimate of a mask's IoU, which must exceed it; 0..1.
      stability_score_thresh: the least IoU of the mask cut at logits above and below 0; 0..1.
      stability_score_offset: how far above and below, in logits.

    Raises:
      ValueError: one is not a number, not finite, or out of range.
    """

    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), 100 if field.name == "stability_score_offset" else 1
            if type(value) not in (int, float) or not 0 <= value <= most or (most == 100 and not value):
                raise ValueError(f"{field.name} {value!r:.40} is no number between 0 and {most}")

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Thresholds:
        """Inverse of `to_json`.

        Raises:
          ValueError: an unknown or missing field, or a value out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or set(fields) != names:
            raise ValueError(f"thresholds are {', '.join(sorted(names))}, all three, and nothing else")
        return cls(**fields)


class Preset(NamedTuple):
    """An architecture whose blocks have the same widths; sizes in pixels, the window's side in tokens."""

    embed_dim: int
    mlp_dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    image_size: int = 1024
    window: int = 14


PRESETS = {
    # segment_anything/build_sam.py
    "vit_b": Preset(768, 3072, 12, 12, (2, 5, 8, 11)),
    "vit_l": Preset(1024, 4096, 24, 16, (5, 11, 17, 23)),
    "vit_h": Preset(1280, 5120, 32, 16, (7, 15, 23, 31)),
    # SlimSAM's
    "vit_p50": Preset(384, 1536, 12, 12, (2, 5, 8, 11)),
    "vit_p77": Preset(168, 696, 12, 12, (2, 5, 8, 11)),
    # The SAM in this package, and half of it
    "small": Preset(192, 768, 8, 6, (1, 3, 5, 7), 256, 6),
    "small_p50": Preset(96, 384, 8, 6, (1, 3, 5, 7), 256, 6),
}


def preset(name: str, image_size: int | tuple[int, int] | None = None) -> Config:
    """An architecture of `PRESETS` by its name, at any image size.

    Args:
      image_size: pixels, one side or (height, width); None for the preset's own.
    """
    return preset_of(PRESETS[name], image_size)


def preset_of(preset: Preset, image_size: int | tuple[int, int] | None = None) -> Config:
    """The architecture of a `Preset`; `image_size` as `preset` takes it."""
    embed_dim, mlp_dim, depth, heads, global_blocks, own_size, window = preset
    size = image_size or own_size
    blocks = tuple(
        Block(heads, embed_dim // heads, mlp_dim, GLOBAL if i in global_blocks else window) for i in range(depth)
    )
    return Config(image_size=(size, size) if isinstance(size, int) else tuple(size), embed_dim=embed_dim, blocks=blocks)


def tokens(config: Config, block: Block) -> int:
    """Tokens that q, k and v are computed for: the grid, padded to whole windows in a window block."""
    if block.window == GLOBAL:
        return math.prod(config.grid)
    return math.prod(-(-side // block.window) * block.window for side in config.grid)
