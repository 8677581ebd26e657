"""One table, read in both directions: `segment_anything` names and layouts <-> our parameter tree.

A row is (PyTorch name, our path, einops pattern from theirs to ours). Wildcards are
spelled {b} (block), {l} (decoder layer), {m} (mask), {j} (MLP layer), {k} (kind of point).
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import numpy as np
from einops import rearrange

from slimsam_jax.models.config import Config

VECTOR, LINEAR, CONV, CONV_TRANSPOSE = "c -> c", "o i -> i o", "o i h w -> h w i o", "i o h w -> h w o i"


class Row(NamedTuple):
    """One array. `path` is ours, slash-separated; `sizes` settles axes that the pattern splits."""

    name: str
    path: str
    pattern: str
    sizes: dict[str, int]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """A view, where there can be one."""
        return rearrange(array, self.pattern, **self.sizes)

    def shape(self, theirs: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape of an array of their shape, which nothing is allocated for."""
        return self.to_ours(np.broadcast_to(np.float32(0), theirs)).shape

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        ours, theirs = self.pattern.split(" -> ")[::-1]
        return np.ascontiguousarray(rearrange(array, f"{ours} -> {theirs}", **self.sizes))


def _layer(name: str, path: str, kernel: str, bias: str | None = VECTOR) -> list[tuple[str, str, str]]:
    rows = [(f"{name}.weight", f"{path}/kernel", kernel)]
    return rows + ([(f"{name}.bias", f"{path}/bias", bias)] if bias else [])


def _norm(name: str, path: str) -> list[tuple[str, str, str]]:
    return [(f"{name}.weight", f"{path}/scale", VECTOR), (f"{name}.bias", f"{path}/bias", VECTOR)]


def _attention(name: str, path: str, projections: str, out: str) -> list[tuple[str, str, str]]:
    rows = [_layer(f"{name}.{p}", f"{path}/{p}", "(n d) c -> c n d", "(n d) -> n d") for p in projections.split()]
    return [*itertools.chain(*rows), *_layer(f"{name}.{out}", f"{path}/{out}", "o (n d) -> n d o")]


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
    """The table for one architecture: a row per array, every wildcard expanded."""
    counts = {"b": len(config.blocks), "l": config.decoder_depth, "m": 1 + config.multimask_outputs, "j": 3, "k": 4}
    sections = {"image_encoder": IMAGE_ENCODER, "prompt_encoder": PROMPT_ENCODER, "mask_decoder": MASK_DECODER}
    found = []
    for section, (name, path, pattern) in ((s, row) for s, table in sections.items() for row in table):
        letters = sorted(set(re.findall(r"{(\w)}", name)))
        for indices in itertools.product(*(range(counts[letter]) for letter in letters)):
            index = dict(zip(letters, indices, strict=True))
            heads = config.blocks[index["b"]].heads if "b" in index else config.decoder_heads
            sizes = {"n": heads} if "(n d)" in pattern else {}
            found.append(Row(f"{section}.{name.format(**index)}", f"{section}/{path.format(**index)}", pattern, sizes))
    return found


def split_qkv(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused `attn.qkv` (rows q, then k, then v) -> `attn.q`, `attn.k`, `attn.v`; leaves split ones alone."""
    split = {}
    for name, array in state.items():
        if ".attn.qkv." in name and array.ndim and len(array) % 3 == 0:
            parts = np.split(array, 3)
            split |= {name.replace(".qkv.", f".{q}."): part for q, part in zip("qkv", parts, strict=True)}
        else:
            split[name] = array
    return split


def fuse_qkv(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `split_qkv`."""
    fused = {}
    for name, array in state.items():
        if ".attn.q." in name:
            parts = [state[name.replace(".q.", f".{q}.")] for q in "qkv"]
            fused[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
        elif not re.search(r"\.attn\.[kv]\.", name):
            fused[name] = array
    return fused
