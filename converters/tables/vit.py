"""SAM's ViT encoder in `segment_anything`: names, layouts, fused qkv, and its widths from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from converters.tables.rows import CONV, LINEAR, _attention, _layer, _norm
from slimsam_jax.models.config import DEEPEST, GLOBAL, Block, Config


def from_state_dict(state: Mapping[str, np.ndarray]) -> Config:
    """Reads the architecture off the shapes of a `segment_anything` state dict (q, k, v apart).

    The head width comes from the relative position tables, so a pruned model needs no
    file beside it. A window as large as the whole grid is reported as global: they are
    the same computation.

    Raises:
      ValueError: the arrays that fix the architecture are missing or contradict each other.
    """
    try:
        _, rows, columns, embed_dim = state["image_encoder.pos_embed"].shape
        patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
        depth = len({k.split(".")[2] for k in state if k.startswith("image_encoder.blocks.")})
        if not 0 < depth <= DEEPEST:
            raise ValueError(f"it has {depth} blocks, and 1 to {DEEPEST} are taken")
        decoder = "mask_decoder.transformer.layers."
        return Config(
            image_size=(rows * patch, columns * patch),
            embed_dim=embed_dim,
            blocks=tuple(_block(state, i, (rows, columns)) for i in range(depth)),
            patch_size=patch,
            out_chans=state["image_encoder.neck.0.weight"].shape[0],
            mask_in_chans=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
            decoder_mlp_dim=state[decoder + "0.mlp.lin1.weight"].shape[0],
            decoder_depth=len({k.split(".")[3] for k in state if k.startswith(decoder)}),
            multimask_outputs=state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
            iou_head_dim=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        )
    except KeyError as missing:
        raise ValueError(f"not a SAM checkpoint: it has no {missing}") from None
    except (ValueError, IndexError) as error:
        raise ValueError(f"not a SAM checkpoint: {error}") from None


def _block(state: Mapping[str, np.ndarray], index: int, grid: tuple[int, int]) -> Block:
    prefix = f"image_encoder.blocks.{index}."
    width = state[prefix + "attn.q.weight"].shape[0]
    rows, head_dim = state[prefix + "attn.rel_pos_h"].shape
    columns, _ = state[prefix + "attn.rel_pos_w"].shape
    span = (rows + 1) // 2, (columns + 1) // 2
    if not head_dim or width % head_dim or (span != grid and span[0] != span[1]):
        raise ValueError(
            f"{prefix}attn: relative positions of {rows} x {columns} rows and {head_dim} channels fit neither "
            f"the grid {grid} nor a square window, or do not divide the {width} channels of q"
        )
    mlp_dim = state[prefix + "mlp.lin1.weight"].shape[0]
    return Block(width // head_dim, head_dim, mlp_dim, GLOBAL if span == grid else span[0])


# q, k and v stand apart, as SlimSAM trains them; `split_qkv` and `fuse_qkv` reach the fused layout.
IMAGE_ENCODER = [
    ("pos_embed", "pos_embed", "1 h w c -> 1 h w c"),
    *_layer("patch_embed.proj", "patch_embed_proj", CONV),
    *_norm("blocks.{b}.norm1", "blocks_{b}/norm1"),
    *_attention("blocks.{b}.attn", "blocks_{b}/attn", "q k v", "proj"),
    ("blocks.{b}.attn.rel_pos_h", "blocks_{b}/attn/rel_pos_h", "s d -> s d"),
    ("blocks.{b}.attn.rel_pos_w", "blocks_{b}/attn/rel_pos_w", "s d -> s d"),
    *_norm("blocks.{b}.norm2", "blocks_{b}/norm2"),
    *_layer("blocks.{b}.mlp.lin1", "blocks_{b}/mlp_lin1", LINEAR),
    *_layer("blocks.{b}.mlp.lin2", "blocks_{b}/mlp_lin2", LINEAR),
    *_layer("neck.0", "neck_0", CONV, None),
    *_norm("neck.1", "neck_1"),
    *_layer("neck.2", "neck_2", CONV, None),
    *_norm("neck.3", "neck_3"),
]


def split_qkv(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits fused `attn.qkv` (rows q, then k, then v) into `attn.q`, `attn.k`, `attn.v`; leaves split ones alone."""
    split = {}
    for name, array in state.items():
        if ".attn.qkv." in name and array.ndim and len(array) % 3 == 0:
            parts = np.split(array, 3)
            split |= {name.replace(".qkv.", f".{q}."): part for q, part in zip("qkv", parts, strict=True)}
        else:
            split[name] = array
    return split


def fuse_qkv(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fuses what `split_qkv` splits."""
    fused = {}
    for name, array in state.items():
        if ".attn.q." in name:
            parts = [state[name.replace(".q.", f".{q}.")] for q in "qkv"]
            fused[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
        elif not re.search(r"\.attn\.[kv]\.", name):
            fused[name] = array
    return fused
