"""MobileSAM's and TinySAM's names and layouts (`mobile_sam.pt`, `tinysam.pth`) <-> ours, strict both ways.

The two have the same 439 names and shapes: nothing in a file tells that TinySAM's decoder is asked for its three masks
alone. Nor does anything tell the image size. What is never run, a classifier of ImageNet's classes, and batch norm's
counters are kept aside for the way back.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.tables import tiny_vit_unused as unused
from converters.tables.rows import CONV, LINEAR, VECTOR, Row, _attention, _layer, _norm
from converters.tables.sam_head import abstract_head, head_architecture, head_rows, with_loader
from converters.tables.strict import Converted, Layer, State, abstract, placed, shapes, to_params, to_state
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import DEEPEST
from slimsam_jax.models.encoders.tiny_vit_config import MOST_STAGES, Config, config_of

POINTWISE = "o i 1 1 -> i o"


def _conv_norm(name: str, path: str, kernel: str) -> list[Layer]:
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    norm = [(f"{name}.bn.{theirs}", f"{path}/bn/{ours}", VECTOR) for theirs, ours in leaves.items()]
    return [(f"{name}.c.weight", f"{path}/kernel", kernel), *norm]


ENDS = [
    *_conv_norm("patch_embed.seq.0", "patch_embed_0", CONV),
    *_conv_norm("patch_embed.seq.2", "patch_embed_2", CONV),
    *_layer("neck.0", "neck_0", CONV, None),
    *_norm("neck.1", "neck_1"),
    *_layer("neck.2", "neck_2", CONV, None),
    *_norm("neck.3", "neck_3"),
]
BOTTLENECK = [  # an MBConv, and a downsampling
    *_conv_norm("conv1", "conv1", POINTWISE),
    *_conv_norm("conv2", "conv2", CONV),
    *_conv_norm("conv3", "conv3", POINTWISE),
]
BLOCK = [
    ("attn.attention_biases", "attn/attention_biases", "n (h w) -> n h w"),
    *_norm("attn.norm", "attn/norm"),
    *_attention("attn", "attn", "q k v", "proj"),  # as `split_qkv` leaves them
    *_conv_norm("local_conv", "local_conv", CONV),
    *_norm("mlp.norm", "mlp/norm"),
    *_layer("mlp.fc1", "mlp/fc1", LINEAR),
    *_layer("mlp.fc2", "mlp/fc2", LINEAR),
]


GIVEN = ("image_size", "single_mask", "strides", "decoder_heads")  # see `converters.families`


class Outline(NamedTuple):
    """What the table needs of an architecture: the number of MBConvs, and (heads, window) of each block by stage."""

    conv_blocks: int
    stages: tuple[tuple[tuple[int, int], ...], ...]


def rows(outline: Outline) -> list[Row]:
    """The table of an image encoder with batch norms: a row per array."""
    section = "image_encoder"
    table = placed(section, section, ENDS)
    for j in range(outline.conv_blocks):
        table += placed(f"{section}.layers.0.blocks.{j}", f"{section}/layers_0/blocks_{j}", BOTTLENECK)
    for i, stage in enumerate(outline.stages):
        table += placed(f"{section}.layers.{i}.downsample", f"{section}/layers_{i}/downsample", BOTTLENECK)
        for j, (heads, window) in enumerate(stage):
            name, path = f"{section}.layers.{i + 1}.blocks.{j}", f"{section}/layers_{i + 1}/blocks_{j}"
            table += placed(name, path, BLOCK, n=heads, h=window)
    return table


def outline_of(config: Config) -> Outline:
    """Of an architecture."""
    stages = (tuple((block.heads, stage.window) for block in stage.blocks) for stage in config.stages)
    return Outline(len(config.conv_blocks), tuple(stages))


def outline(state: Mapping[str, np.ndarray]) -> Outline:
    """Of a state dict: heads and windows are the rows and the columns of its bias tables.

    Raises:
      ValueError: it has too many blocks, or a block without a table, or with one that is no square window's.
    """
    found = [re.match(r"image_encoder\.layers\.(\d+)\.blocks\.(\d+)\.", name) for name in state]
    places = {(int(match[1][:4]), int(match[2][:4])) for match in found if match}
    depths = [len({j for i, j in places if i == stage}) for stage in range(MOST_STAGES + 1)]
    if sum(depths) > DEEPEST or any(i > MOST_STAGES for i, _ in places):
        raise ValueError(f"it has {len(places)} blocks, and at most {DEEPEST} in 1 + {MOST_STAGES} stages are taken")
    tables = "image_encoder.layers.{}.blocks.{}.attn.attention_biases"
    stages = [tuple(_window(state, tables.format(i, j)) for j in range(depths[i])) for i in range(1, len(depths))]
    last = max((i for i, stage in enumerate(stages, start=1) if stage), default=0)
    return Outline(depths[0], tuple(stages[:last]))


def _window(state: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    """(heads, side of the window) of a bias table."""
    if name not in state:
        raise ValueError(f"it has no {name}")
    shape = state[name].shape
    side = math.isqrt(shape[1]) if len(shape) == 2 else 0
    if not side or side**2 != shape[1] or not shape[0]:
        raise ValueError(f"{name} of shape {shape} is no table of heads and a square window")
    return shape[0], side


def norms(form: Outline) -> list[str]:
    """Names of the batch norms."""
    return [row.name.removesuffix(".running_var") for row in rows(form) if row.name.endswith(".running_var")]


def recognises(names: Container[str]) -> bool:
    """Whether a state dict of these names is this family's."""
    return "image_encoder.patch_embed.seq.0.c.weight" in names


def from_state_dict(
    state: Mapping[str, np.ndarray],
    where: str = "the state dict",
    image_size: int | tuple[int, int] = 1024,
    strides: Sequence[int] | None = None,
    decoder_heads: int = 8,
) -> Converted:
    """Converts a state dict of MobileSAM or TinySAM, or a slim one.

    Args:
      state: {name: array}.
      where: what to call it in error messages.
      image_size: pixels, one side or (height, width).
      strides: of the downsamplings; None for the published ones: 2, and 1 for the last.
      decoder_heads: of the decoder.

    Raises:
      InputError: a name missing or surplus, a shape that fits no such model, or an argument does not fit.
    """
    from slimsam_jax.models.encoders.tiny_vit import ImageEncoder

    kept = {name: state[name] for name in state if unused.is_kept(name)}
    used = {name: state[name] for name in state if name not in kept}
    try:
        form = outline(used)
        used = split_qkv(used, form)
        head = head_architecture(used, decoder_heads)
        table = [*rows(form), *head_rows(head)]
        encoder = config_of(shapes(used, table, where)["image_encoder"], image_size, strides)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{where}: {error}") from None
    head = dataclasses.replace(head, image_size=encoder.image_size, patch_size=encoder.stride)
    unused.check(kept, norms(form), encoder, where)
    expected = {"image_encoder": abstract(ImageEncoder(encoder)), **abstract_head(head)}
    return Converted(encoder, head, to_params(used, table, expected, where), kept)


def to_state_dict(model: Converted) -> State:
    """Inverse of `from_state_dict`, exact; a folded encoder gets batch norms that change nothing.

    Args:
      model: what its `kept` lacks is made, a classifier of zeros of 1000 classes and counters of zero, so that the
        original's class loads it strictly.

    Raises:
      InputError: an array is missing or surplus, or what was kept is not this encoder's.
    """
    from slimsam_jax.models.encoders.layers import unfold_batch_norm

    encoder, params, form = model.encoder, model.params, outline_of(model.encoder)
    if not encoder.batch_norm:
        paths = [row.path.removesuffix("/bn/var") for row in rows(form) if row.path.endswith("/bn/var")]
        params = unfold_batch_norm(params, paths)
    unused.check(model.kept, norms(form), encoder, "what was kept")
    kept = unused.fresh(norms(form), encoder) | model.kept
    return {**fuse_qkv(to_state(params, [*rows(form), *head_rows(model.head)]), form), **kept}


def attentions(form: Outline) -> Iterator[tuple[str, int]]:
    """(name, heads) of every attention."""
    for i, stage in enumerate(form.stages, start=1):
        for j, (heads, _) in enumerate(stage):
            yield f"image_encoder.layers.{i}.blocks.{j}.attn", heads


def split_qkv(state: Mapping[str, np.ndarray], form: Outline) -> State:
    """Fused `qkv`, whose rows are q, k and v of one head after the other, -> `q`, `k` and `v`.

    Raises:
      ValueError: its rows, or the columns of `proj`, are no such heads.
    """
    split = dict(state)
    for name, heads in attentions(form):
        if f"{name}.proj.weight" not in state:
            continue  # which the table will miss
        values = state[f"{name}.proj.weight"].shape[-1]
        for leaf in ("weight", "bias"):
            fused = split.pop(f"{name}.qkv.{leaf}", None)
            if fused is None:
                continue
            width = len(fused) if fused.ndim else 0
            if width <= values or values % heads or (width - values) % (2 * heads):
                raise ValueError(f"{name}: {width} rows of qkv and {values} columns of proj are no {heads} heads")
            keys, shape = (width - values) // (2 * heads), fused.shape[1:]
            parts = np.split(fused.reshape(heads, -1, *shape), [keys, 2 * keys], axis=1)
            split |= {f"{name}.{q}.{leaf}": part.reshape(-1, *shape) for q, part in zip("qkv", parts, strict=True)}
    return split


def fuse_qkv(state: Mapping[str, np.ndarray], form: Outline) -> State:
    """Inverse of `split_qkv`."""
    fused = dict(state)
    for name, heads in attentions(form):
        for leaf in ("weight", "bias"):
            parts = [fused.pop(f"{name}.{q}.{leaf}") for q in "qkv"]
            by_head = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
            fused[f"{name}.qkv.{leaf}"] = np.concatenate(by_head, axis=1).reshape(-1, *parts[0].shape[1:])
    return fused


def obstacle(config: Any) -> str:
    """Why MobileSAM's class cannot hold a model of this architecture; "" if it can."""
    return unused.obstacle(config.encoder)


def given_by(config: Any) -> dict[str, Any]:
    """What no array tells."""
    strides = tuple(stage.stride for stage in config.encoder.stages)
    own = {name: getattr(config, name) for name in ("image_size", "single_mask", "decoder_heads")}
    return {**own, "strides": strides}


def how_to_load(sam: Any, path: Path) -> str:
    """Lines for those who have a .pth of it. MobileSAM's code reads attention's tables when `eval` is called."""
    theirs = f"with MobileSAM's code: mobile_sam.sam_model_registry['vit_t'](checkpoint={str(path)!r}).eval()"
    if reason := obstacle(sam.config) or unused.other_classes(sam.kept):
        theirs = f"MobileSAM's class cannot hold this encoder: {reason}"
    return f"{with_loader('tiny_vit_sam_torch', sam, path)}\n{theirs}"
