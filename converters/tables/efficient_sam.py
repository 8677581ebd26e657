"""EfficientSAM's names and layouts (`efficient_sam_vitt.pt`, `efficient_sam_vits.pt`) <-> ours, strict both ways.

The published files hold the state dict under "model". Nothing in it tells the number of heads, nor the image size.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.tables.rows import CONV, CONV_TRANSPOSE, LINEAR, Row, _attention, _layer, _norm
from converters.tables.strict import Converted, Layer, State, placed, shapes, to_params, to_state
from converters.tables.vit import fuse_qkv
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import DEEPEST, MOST_LAYERS, Thresholds

PUBLISHED_HEADS = {192: 3, 384: 6}  # by the width of the embedding


def _mlp(name: str, path: str) -> list[Layer]:
    layers = [_layer(f"{name}.layers.{i}.0", f"{path}/layers_{i}", LINEAR) for i in range(2)]
    return [*layers[0], *layers[1], *_layer(f"{name}.fc", f"{path}/layers_2", LINEAR)]


ENDS = [
    ("pos_embed", "pos_embed", "1 p c -> p c"),
    *_layer("patch_embed.proj", "patch_embed_proj", CONV),
    *_layer("neck.0", "neck_0", CONV, None),
    *_norm("neck.1", "neck_1"),
    *_layer("neck.2", "neck_2", CONV, None),
    *_norm("neck.3", "neck_3"),
]
BLOCK = [
    *_norm("norm1", "norm1"),
    *_attention("attn", "attn", "q k v", "proj"),  # as `split_qkv` leaves them
    *_norm("norm2", "norm2"),
    *_layer("mlp.fc1", "mlp_lin1", LINEAR),
    *_layer("mlp.fc2", "mlp_lin2", LINEAR),
]
PROMPT_ENCODER = [
    ("pe_layer.positional_encoding_gaussian_matrix", "positional_encoding_gaussian_matrix", "x f -> x f"),
    *(
        (f"{name}.weight", name, "1 c -> 1 c")
        for name in ("invalid_points", "point_embeddings", "bbox_top_left_embeddings", "bbox_bottom_right_embeddings")
    ),
]
DECODER_LAYER = [
    *_attention("self_attn", "self_attn", "q_proj k_proj v_proj", "out_proj"),
    *_attention("cross_attn_token_to_image", "cross_attn_token_to_image", "q_proj k_proj v_proj", "out_proj"),
    *_attention("cross_attn_image_to_token", "cross_attn_image_to_token", "q_proj k_proj v_proj", "out_proj"),
    *(row for k in "1234" for row in _norm(f"norm{k}", f"norm{k}")),
    *_layer("mlp.layers.0.0", "mlp_lin1", LINEAR),
    *_layer("mlp.fc", "mlp_lin2", LINEAR),
]
DECODER = [
    ("iou_token.weight", "iou_token", "t c -> t c"),
    ("mask_tokens.weight", "mask_tokens", "t c -> t c"),
    *_attention(
        "transformer.final_attn_token_to_image",
        "transformer/final_attn_token_to_image",
        "q_proj k_proj v_proj",
        "out_proj",
    ),
    *_norm("transformer.norm_final_attn", "transformer/norm_final_attn"),
    *_layer("final_output_upscaling_layers.0.0", "output_upscaling_0", CONV_TRANSPOSE),
    *_norm("final_output_upscaling_layers.0.1", "output_upscaling_1"),
    *_layer("final_output_upscaling_layers.1.0", "output_upscaling_3", CONV_TRANSPOSE),
    *_mlp("iou_prediction_head", "iou_prediction_head"),
]


GIVEN = ("image_size", "heads", "decoder_heads")  # see `converters.families`
THRESHOLDS = Thresholds(pred_iou_thresh=0.7, stability_score_thresh=0.9)  # of its own notebook for everything mode
UNIT_IMAGES = True


class Outline(NamedTuple):
    """What the table needs of an architecture.

    Attributes:
      heads: of each block's attention.
      layers, decoder_heads: of the decoder's transformer.
      masks: that the decoder predicts.
    """

    heads: tuple[int, ...]
    layers: int
    decoder_heads: int
    masks: int


def rows(outline: Outline) -> list[Row]:
    """The table of a whole model: a row per array."""
    table = placed("image_encoder", "image_encoder", ENDS)
    for i, heads in enumerate(outline.heads):
        table += placed(f"image_encoder.blocks.{i}", f"image_encoder/blocks_{i}", BLOCK, n=heads)
    table += placed("prompt_encoder", "prompt_encoder", PROMPT_ENCODER)
    table += placed("mask_decoder", "mask_decoder", DECODER, n=outline.decoder_heads)
    for i in range(outline.layers):
        name, path = f"mask_decoder.transformer.layers.{i}", f"mask_decoder/transformer/layers_{i}"
        table += placed(name, path, DECODER_LAYER, n=outline.decoder_heads)
    for i in range(outline.masks):
        name = f"output_hypernetworks_mlps.{i}"
        table += placed("mask_decoder", "mask_decoder", _mlp(name, name.replace(".", "_")))
    return table


def outline_of(encoder: Any, head: Any) -> Outline:
    """Of the two architectures."""
    heads = tuple(block.heads for block in encoder.blocks)
    return Outline(heads, head.decoder_depth, head.decoder_heads, 1 + head.multimask_outputs)


def recognises(names: Container[str]) -> bool:
    """Whether a state dict of these names is this family's."""
    return "prompt_encoder.bbox_top_left_embeddings.weight" in names


def from_state_dict(
    state: Mapping[str, np.ndarray],
    where: str = "the state dict",
    image_size: int | tuple[int, int] = 1024,
    heads: int | Sequence[int] | None = None,
    decoder_heads: int = 8,
) -> Converted:
    """Converts a state dict of EfficientSAM, or a slim one.

    Args:
      state: {name: array}.
      where: what to call it in error messages.
      image_size: pixels, one side or (height, width).
      heads: of the image encoder's blocks, one number or one a block; None for the published model's, which its width
        tells apart.
      decoder_heads: of the decoder.

    Raises:
      InputError: a name missing or surplus, a shape that fits no such model, or an argument does not fit.
    """
    from slimsam_jax.models.encoders.efficient_sam_vit import abstract_params, config_of
    from slimsam_jax.models.sam import abstract_head

    try:
        outline = _outline(state, heads, decoder_heads)
        used, table = split_qkv(state, outline), rows(outline)
        tree = shapes(used, table, where)
        encoder = config_of(tree["image_encoder"], image_size)
        head = _head(tree, encoder, decoder_heads)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{where}: {error}") from None
    expected = {"image_encoder": abstract_params(encoder), **abstract_head(head)}
    return Converted(encoder, head, to_params(used, table, expected, where), {})


def to_state_dict(model: Converted) -> State:
    """Inverse of `from_state_dict`, exact.

    Raises:
      InputError: an array is missing or surplus.
    """
    return fuse_qkv(to_state(model.params, rows(outline_of(model.encoder, model.head))))


def _outline(state: Mapping[str, np.ndarray], heads: int | Sequence[int] | None, decoder_heads: int) -> Outline:
    """Raises ValueError if there are too many blocks, or the number of heads must be given."""
    depth = sum(f"image_encoder.blocks.{i}.norm1.weight" in state for i in range(DEEPEST))
    layers = sum(f"mask_decoder.transformer.layers.{i}.norm1.weight" in state for i in range(MOST_LAYERS))
    masks = sum(f"mask_decoder.output_hypernetworks_mlps.{i}.fc.weight" in state for i in range(MOST_LAYERS + 1))
    if heads is None:
        width = state["image_encoder.pos_embed"].shape[-1] if "image_encoder.pos_embed" in state else 0
        if width not in PUBLISHED_HEADS:
            raise ValueError(f"its width {width} is no published model's, so the number of heads must be given: heads=")
        heads = PUBLISHED_HEADS[width]
    heads = (heads,) * depth if isinstance(heads, int) else tuple(heads)
    if len(heads) != depth or any(type(n) is not int or n < 1 for n in (*heads, decoder_heads)):
        given = f"heads {heads!r:.60} and decoder_heads {decoder_heads!r:.40}"
        raise ValueError(f"{given} are no numbers of heads of {depth} blocks and a decoder")
    return Outline(heads, layers, decoder_heads, masks)


def _head(tree: Mapping[str, Any], encoder: Any, decoder_heads: int) -> Any:
    from slimsam_jax.models.efficient_sam_head import HeadConfig

    decoder = tree["mask_decoder"]
    layers = [name for name in decoder["transformer"] if name.startswith("layers_")]
    if not layers:
        raise ValueError("its decoder has no layers")
    return HeadConfig(
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
        out_chans=decoder["iou_token"].shape[1],
        decoder_heads=decoder_heads,
        decoder_mlp_dim=decoder["transformer"]["layers_0"]["mlp_lin1"]["kernel"].shape[1],
        decoder_depth=len(layers),
        multimask_outputs=decoder["mask_tokens"].shape[0] - 1,
        iou_head_dim=decoder["iou_prediction_head"]["layers_0"]["kernel"].shape[1],
        upscaling_dims=tuple(decoder[f"output_upscaling_{i}"]["bias"].shape[0] for i in (0, 3)),
    )


def split_qkv(state: Mapping[str, np.ndarray], outline: Outline) -> State:
    """Fused `qkv`, whose rows are all of q, of k and of v, -> `q`, `k` and `v`.

    Raises:
      ValueError: its rows, or the columns of `proj`, are no such heads.
    """
    split = dict(state)
    for i, heads in enumerate(outline.heads):
        name = f"image_encoder.blocks.{i}.attn"
        if not {f"{name}.{leaf}" for leaf in ("proj.weight", "qkv.weight", "qkv.bias")} <= set(state):
            continue  # the table will miss what is not there
        values, rows = state[f"{name}.proj.weight"].shape[-1], len(state[f"{name}.qkv.weight"])
        if rows <= values or values % heads or (rows - values) % (2 * heads):
            raise ValueError(f"{name}: {rows} rows of qkv and {values} columns of proj are no {heads} heads")
        keys = (rows - values) // 2
        for leaf in ("weight", "bias"):
            parts = np.split(split.pop(f"{name}.qkv.{leaf}"), [keys, 2 * keys])
            split |= {f"{name}.{q}.{leaf}": part for q, part in zip("qkv", parts, strict=True)}
    return split


def obstacle(config: Any) -> str:
    """Why the original's `build_efficient_sam` cannot hold a model, in a few words; "" if it can.

    It has one width for the stream and for all heads together, MLPs four times as wide, and all else fixed.
    """
    encoder, head, blocks = config.encoder, config.head, config.encoder.blocks
    whole = {(block.heads * block.key_dim, block.heads * block.value_dim) for block in blocks}
    fixed = (head.out_chans, head.decoder_heads, head.decoder_depth, head.decoder_mlp_dim, head.multimask_outputs)
    reasons = {
        "blocks of different widths": len(set(blocks)) > 1,
        "heads that are together not as wide as the embedding": whole != {(encoder.embed_dim,) * 2},
        "MLPs that are not four times as wide as the embedding": {b.mlp_dim for b in blocks} != {4 * encoder.embed_dim},
        "another number of blocks than 12": len(blocks) != 12,
        "another image size than 1024": config.image_size != (1024, 1024),
        "other patches than of 16 pixels": (encoder.patch_size, encoder.pretrain_grid) != (16, 14),
        "another decoder": fixed != (256, 8, 2, 2048, 3) or (head.iou_head_dim, head.upscaling_dims) != (256, (64, 32)),
    }
    return next((f"it has {reason}" for reason, there in reasons.items() if there), "")


def given_by(config: Any) -> dict[str, Any]:
    """What no array tells."""
    heads = tuple(block.heads for block in config.encoder.blocks)
    return {"image_size": config.image_size, "heads": heads, "decoder_heads": config.decoder_heads}


def how_to_load(sam: Any, path: Path) -> str:
    """Lines for those who have a .pth of it."""
    config = sam.config
    lines = [f"in Python: import efficient_sam_torch; model = efficient_sam_torch.load({str(path)!r})"]
    if reason := obstacle(config):
        return "\n".join([*lines, f"EfficientSAM's own class cannot hold it: {reason}"])
    width, heads = config.encoder.embed_dim, config.encoder.blocks[0].heads
    arguments = f"encoder_patch_embed_dim={width}, encoder_num_heads={heads}, checkpoint={str(path)!r}"
    return "\n".join([*lines, f"with EfficientSAM's code: build_efficient_sam({arguments})"])
