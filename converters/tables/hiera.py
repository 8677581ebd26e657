"""SAM 2's and SAM 2.1's names and layouts in image mode (`sam2.1_hiera_*.pt`) <-> ours, strict both ways.

The published files hold the state dict under "model". Nothing in it tells heads, windows but the first stage's, which
blocks are global, nor the image size. What only videos need, the memory, is kept aside for the way back.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from converters.tables.hiera_stock import how_to_load, obstacle
from converters.tables.rows import CONV, LINEAR, Row, _attention, _layer, _norm
from converters.tables.sam_head import head_rows
from converters.tables.strict import Converted, Layer, State, placed, shapes, to_params, to_state
from converters.tables.vit import fuse_qkv
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import DEEPEST, MOST_LAYERS, Config, Thresholds

__all__ = [
    "GIVEN",
    "THRESHOLDS",
    "UNIT_IMAGES",
    "from_state_dict",
    "given_by",
    "how_to_load",
    "obstacle",
    "recognises",
    "to_state_dict",
]

POINTWISE = "o i 1 1 -> i o"
TRUNK, DECODER = "image_encoder.trunk", "sam_mask_decoder"
BLOCK = [
    *_norm("norm1", "norm1"),
    *_attention("attn", "attn", "q k v", "proj"),  # as `split_qkv` leaves them
    *_norm("norm2", "norm2"),
    *_layer("mlp.layers.0", "mlp_lin1", LINEAR),
    *_layer("mlp.layers.1", "mlp_lin2", LINEAR),
]
PROJECTION = _layer("proj", "proj", LINEAR)  # of a block that changes the width
ENDS = [
    ("pos_embed", "pos_embed", "1 c h w -> h w c"),
    ("pos_embed_window", "pos_embed_window", "1 c h w -> h w c"),
    *_layer("patch_embed.proj", "patch_embed_proj", CONV),
]
NO_MEMORY = Row("no_mem_embed", "image_encoder/no_mem_embed", "1 1 c -> c", {})
SCORE: list[Layer] = [
    ("obj_score_token.weight", "obj_score_token", "t c -> t c"),
    *_layer("pred_obj_score_head.layers.0", "pred_obj_score_head/layers_0", LINEAR),
    *_layer("pred_obj_score_head.layers.1", "pred_obj_score_head/layers_1", LINEAR),
    *_layer("pred_obj_score_head.layers.2", "pred_obj_score_head/layers_2", LINEAR),
]
# Of videos alone, in 2.0 and 2.1: `sam_prompt_encoder.mask_downscaling` is image mode, `mask_downsample` is not.
VIDEO = ("memory_attention.", "memory_encoder.", "obj_ptr_proj.", "obj_ptr_tpos_proj.", "mask_downsample.")
VIDEO_SINGLES = ("maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial")

GIVEN = ("image_size", "heads", "windows", "global_blocks", "decoder_heads", "iou_sigmoid", "dynamic_multimask")
THRESHOLDS = Thresholds(pred_iou_thresh=0.8)  # of its own everything mode
UNIT_IMAGES = True


class Outline(NamedTuple):
    """What the table needs of an architecture.

    Attributes:
      heads: of each block's attention.
      firsts: places of the blocks that change the width.
      layers, decoder_heads: of the decoder's transformer.
      masks: that the decoder predicts.
    """

    heads: tuple[int, ...]
    firsts: tuple[int, ...]
    layers: int
    decoder_heads: int
    masks: int


def rows(outline: Outline) -> list[Row]:
    """The table of all that image mode reads: a row per array."""
    table = [*placed(TRUNK, "image_encoder", ENDS), NO_MEMORY]
    for i, heads in enumerate(outline.heads):
        layers = BLOCK + (PROJECTION if i in outline.firsts else [])
        table += placed(f"{TRUNK}.blocks.{i}", f"image_encoder/blocks_{i}", layers, n=heads)
    for i in range(4):
        table += placed("image_encoder", "image_encoder", _layer(f"neck.convs.{i}.conv", f"neck_{i}", POINTWISE))
    for i in range(2):  # parameters of the decoder there, and run once an image, too
        table += placed(DECODER, "image_encoder", _layer(f"conv_s{i}", f"high_res_{i}", POINTWISE))
    return table + placed(DECODER, "mask_decoder", SCORE) + [_renamed(row) for row in _head_rows(outline)]


def _head_rows(outline: Outline) -> list[Row]:
    """SAM's own, without an image encoder's."""
    numbers = {"decoder_depth": outline.layers, "multimask_outputs": outline.masks - 1}
    width = 16 * outline.decoder_heads  # any that heads divide: a table knows no widths
    return head_rows(Config((16, 16), 0, (), out_chans=width, decoder_heads=outline.decoder_heads, **numbers))


def _renamed(row: Row) -> Row:
    """A row of SAM's head by SAM 2's name."""
    name = row.name.replace(".mlp.lin1.", ".mlp.layers.0.").replace(".mlp.lin2.", ".mlp.layers.1.")
    return row._replace(name=f"sam_{name}")


def outline_of(encoder: Any, head: Any) -> Outline:
    """Of the two architectures."""
    heads = tuple(block.heads for stage in encoder.stages for block in stage.blocks)
    layers = head.decoder_depth, head.decoder_heads, 1 + head.multimask_outputs
    return Outline(heads, encoder.firsts[1:], *layers)


def recognises(names: Container[str]) -> bool:
    """Whether a state dict of these names is this family's."""
    return f"{TRUNK}.pos_embed_window" in names


def is_kept(name: str) -> bool:
    """Whether an array is of videos alone."""
    return name.startswith(VIDEO) or name in VIDEO_SINGLES


class Published(NamedTuple):
    """What no array of a published model tells, by the number of blocks of its stages."""

    heads: dict[int, int]  # of the first stage, by its width
    windows: tuple[int, ...]
    global_blocks: tuple[int, ...]


PUBLISHED = {
    (1, 2, 7, 2): Published({96: 1}, (8, 4, 14, 7), (5, 7, 9)),
    (1, 2, 11, 2): Published({96: 1}, (8, 4, 14, 7), (7, 10, 13)),
    (2, 3, 16, 3): Published({112: 2}, (8, 4, 14, 7), (12, 16, 20)),
    (2, 6, 36, 4): Published({144: 2}, (8, 4, 16, 8), (23, 33, 43)),
}


def from_state_dict(
    state: Mapping[str, np.ndarray],
    where: str = "the state dict",
    image_size: int | tuple[int, int] = 1024,
    heads: int | Sequence[int] | None = None,
    windows: Sequence[int] | None = None,
    global_blocks: Sequence[int] | None = None,
    decoder_heads: int = 8,
    iou_sigmoid: bool = True,
    dynamic_multimask: bool = True,
) -> Converted:
    """Converts a state dict of SAM 2 or 2.1, or of a slim one.

    Args:
      state: {name: array}.
      where: what to call it in error messages.
      image_size: pixels, one side or (height, width).
      heads: of the image encoder's blocks, one number or one a block; None for those of the published model, which its
        width and depths tell apart.
      windows, global_blocks: see `hiera.Config`; None for those of the published model of as many blocks.
      decoder_heads, iou_sigmoid, dynamic_multimask: see `sam2_head.HeadConfig`.

    Raises:
      InputError: a name missing or surplus, a shape that fits no such model, or an argument does not fit.
    """
    from slimsam_jax.models.encoders.hiera import abstract_params, config_of
    from slimsam_jax.models.sam import abstract_head

    kept = {name: state[name] for name in state if is_kept(name)}
    used = {name: state[name] for name in state if name not in kept}
    try:
        outline, windows, global_blocks = _outline(used, heads, windows, global_blocks, decoder_heads)
        used, table = split_qkv(used, outline), rows(outline)
        tree = shapes(used, table, where)
        encoder = config_of(tree["image_encoder"], image_size, windows, global_blocks)
        head = _head(tree, encoder, decoder_heads, iou_sigmoid, dynamic_multimask)
    except (ValueError, TypeError, IndexError) as error:  # an array without axes has no first one
        raise error if isinstance(error, InputError) else InputError(f"{where}: {error}") from None
    expected = {"image_encoder": abstract_params(encoder), **abstract_head(head)}
    return Converted(encoder, head, to_params(used, table, expected, where), kept)


def to_state_dict(model: Converted) -> State:
    """Inverse of `from_state_dict`, exact, with what was kept: without it the memory of videos is missing.

    Raises:
      InputError: an array is missing or surplus, or what was kept is not of SAM 2.
    """
    if surplus := [name for name in model.kept if not is_kept(name)]:
        raise InputError(f"what was kept is not of SAM 2's memory of videos: {surplus[0]!r:.80}")
    return {**fuse_qkv(to_state(model.params, rows(outline_of(model.encoder, model.head)))), **model.kept}


def _outline(
    state: Mapping[str, np.ndarray], heads: Any, windows: Any, global_blocks: Any, decoder_heads: int
) -> tuple[Outline, Sequence[int], Sequence[int]]:
    """The outline, windows and global blocks. Raises ValueError if there are too many blocks, or one must be given."""
    depth = sum(f"{TRUNK}.blocks.{i}.norm1.weight" in state for i in range(DEEPEST))
    firsts = tuple(i for i in range(depth) if f"{TRUNK}.blocks.{i}.proj.weight" in state)
    depths = tuple(end - start for start, end in zip((0, *firsts), (*firsts, depth), strict=True))
    layers = sum(f"{DECODER}.transformer.layers.{i}.norm1.weight" in state for i in range(MOST_LAYERS))
    masks = sum(f"{DECODER}.output_hypernetworks_mlps.{i}.layers.0.weight" in state for i in range(MOST_LAYERS + 1))
    if depths not in PUBLISHED and (windows is None or global_blocks is None):
        advice = "converters.from_torch.from_state_dict takes windows=, global_blocks= and heads="
        raise ValueError(f"its stages of {depths} blocks are no published model's: {advice}")
    known = PUBLISHED.get(depths, Published({}, (), ()))
    if heads is None:
        name = f"{TRUNK}.patch_embed.proj.bias"
        width = state[name].size if name in state else 0
        if width not in known.heads:
            raise ValueError(f"its width {width} is no published model's, so the number of heads must be given: heads=")
        heads = [known.heads[width] << sum(i >= first for first in firsts) for i in range(depth)]
    heads = (heads,) * depth if isinstance(heads, int) else tuple(heads)
    if len(heads) != depth or any(type(n) is not int or n < 1 for n in (*heads, decoder_heads)):
        given = f"heads {heads!r:.60} and decoder_heads {decoder_heads!r:.40}"
        raise ValueError(f"{given} are no numbers of heads of {depth} blocks and a decoder")
    windows = known.windows if windows is None else windows
    return (
        Outline(heads, firsts, layers, decoder_heads, masks),
        windows,
        (known.global_blocks if global_blocks is None else global_blocks),
    )


def _head(tree: Mapping[str, Any], encoder: Any, decoder_heads: int, iou_sigmoid: bool, dynamic: bool) -> Any:
    from slimsam_jax.models.sam2_head import HeadConfig

    decoder = tree["mask_decoder"]
    layers = [name for name in decoder["transformer"] if name.startswith("layers_")]
    if not layers:
        raise ValueError("its decoder has no layers")
    return HeadConfig(
        image_size=encoder.image_size,
        out_chans=decoder["iou_token"].shape[1],
        mask_in_chans=tree["prompt_encoder"]["mask_downscaling_3"]["bias"].shape[0],
        decoder_heads=decoder_heads,
        decoder_mlp_dim=decoder["transformer"]["layers_0"]["mlp_lin1"]["kernel"].shape[1],
        decoder_depth=len(layers),
        multimask_outputs=decoder["mask_tokens"].shape[0] - 1,
        iou_head_dim=decoder["iou_prediction_head"]["layers_0"]["kernel"].shape[1],
        iou_sigmoid=iou_sigmoid,
        dynamic_multimask=dynamic,
    )


def attentions(outline: Outline) -> Iterator[tuple[str, int]]:
    """(name, heads) of every attention of the image encoder."""
    return ((f"{TRUNK}.blocks.{i}.attn", heads) for i, heads in enumerate(outline.heads))


def split_qkv(state: Mapping[str, np.ndarray], outline: Outline) -> State:
    """Fused `qkv`, whose rows are all of q, of k and of v, -> `q`, `k` and `v`.

    Raises:
      ValueError: its rows, or the columns of `proj`, are no such heads.
    """
    split = dict(state)
    for name, heads in attentions(outline):
        if not {f"{name}.{leaf}" for leaf in ("proj.weight", "qkv.weight", "qkv.bias")} <= set(state):
            continue  # the table will miss what is not there
        values, fused = state[f"{name}.proj.weight"].shape[-1], len(state[f"{name}.qkv.weight"])
        if fused <= values or values % heads or (fused - values) % (2 * heads):
            raise ValueError(f"{name}: {fused} rows of qkv and {values} columns of proj are no {heads} heads")
        keys = (fused - values) // 2
        for leaf in ("weight", "bias"):
            parts = np.split(split.pop(f"{name}.qkv.{leaf}"), [keys, 2 * keys])
            split |= {f"{name}.{q}.{leaf}": part for q, part in zip("qkv", parts, strict=True)}
    return split


def given_by(config: Any) -> dict[str, Any]:
    """What no array tells."""
    encoder, head = config.encoder, config.head
    heads = tuple(block.heads for stage in encoder.stages for block in stage.blocks)
    own = {name: getattr(head, name) for name in ("image_size", "decoder_heads", "iou_sigmoid", "dynamic_multimask")}
    windows = tuple(stage.window for stage in encoder.stages)
    return {**own, "heads": heads, "windows": windows, "global_blocks": encoder.global_blocks}
