"""One table, read in both directions: `segment_anything` names and layouts <-> our parameter tree.

A row is (PyTorch name, our path, einops pattern from theirs to ours). Wildcards are
spelled {b} (block), {l} (decoder layer), {m} (mask), {j} (MLP layer), {k} (kind of point).
"""

from __future__ import annotations

import itertools
import re

from converters.tables.rows import CONV, CONV_TRANSPOSE, LINEAR, Row, _attention, _layer, _norm
from converters.tables.vit import IMAGE_ENCODER
from slimsam_jax.models.config import Config

PROMPT_ENCODER = [
    ("pe_layer.positional_encoding_gaussian_matrix", "positional_encoding_gaussian_matrix", "x f -> x f"),
    ("point_embeddings.{k}.weight", "point_embeddings_{k}", "1 c -> 1 c"),
    ("not_a_point_embed.weight", "not_a_point_embed", "1 c -> 1 c"),
    ("no_mask_embed.weight", "no_mask_embed", "1 c -> 1 c"),
    *_layer("mask_downscaling.0", "mask_downscaling_0", CONV),
    *_norm("mask_downscaling.1", "mask_downscaling_1"),
    *_layer("mask_downscaling.3", "mask_downscaling_3", CONV),
    *_norm("mask_downscaling.4", "mask_downscaling_4"),
    *_layer("mask_downscaling.6", "mask_downscaling_6", CONV),
]
_CROSS = [
    _attention(f"transformer.{name}", f"transformer/{path}", "q_proj k_proj v_proj", "out_proj")
    for name, path in (
        ("layers.{l}.self_attn", "layers_{l}/self_attn"),
        ("layers.{l}.cross_attn_token_to_image", "layers_{l}/cross_attn_token_to_image"),
        ("layers.{l}.cross_attn_image_to_token", "layers_{l}/cross_attn_image_to_token"),
        ("final_attn_token_to_image", "final_attn_token_to_image"),
    )
]
MASK_DECODER = [
    ("iou_token.weight", "iou_token", "t c -> t c"),
    ("mask_tokens.weight", "mask_tokens", "t c -> t c"),
    *itertools.chain(*_CROSS),
    *itertools.chain(
        *(_norm(f"transformer.layers.{{l}}.norm{k}", f"transformer/layers_{{l}}/norm{k}") for k in "1234")
    ),
    *_layer("transformer.layers.{l}.mlp.lin1", "transformer/layers_{l}/mlp_lin1", LINEAR),
    *_layer("transformer.layers.{l}.mlp.lin2", "transformer/layers_{l}/mlp_lin2", LINEAR),
    *_norm("transformer.norm_final_attn", "transformer/norm_final_attn"),
    *_layer("output_upscaling.0", "output_upscaling_0", CONV_TRANSPOSE),
    *_norm("output_upscaling.1", "output_upscaling_1"),
    *_layer("output_upscaling.3", "output_upscaling_3", CONV_TRANSPOSE),
    *_layer("output_hypernetworks_mlps.{m}.layers.{j}", "output_hypernetworks_mlps_{m}/layers_{j}", LINEAR),
    *_layer("iou_prediction_head.layers.{j}", "iou_prediction_head/layers_{j}", LINEAR),
]


def rows(config: Config) -> list[Row]:
    """Lists the table for one architecture: a row per array, every wildcard expanded."""
    counts = {"b": len(config.blocks), "l": config.decoder_depth, "m": 1 + config.multimask_outputs, "j": 3, "k": 4}
    sections = {"image_encoder": IMAGE_ENCODER, "prompt_encoder": PROMPT_ENCODER, "mask_decoder": MASK_DECODER}
    every = []
    for section, (name, path, pattern) in ((s, row) for s, table in sections.items() for row in table):
        letters = sorted(set(re.findall(r"{(\w)}", name)))
        for indices in itertools.product(*(range(counts[letter]) for letter in letters)):
            index = dict(zip(letters, indices, strict=True))
            heads = config.blocks[index["b"]].heads if "b" in index else config.decoder_heads
            sizes = {"n": heads} if "(n d)" in pattern else {}
            every.append(Row(f"{section}.{name.format(**index)}", f"{section}/{path.format(**index)}", pattern, sizes))
    return every
