"""SAM's prompt encoder and mask decoder, which encoder families share: the table, and the architecture from shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.tables.rows import Row
from converters.tables.sam import rows
from slimsam_jax.models.config import Config

SECTIONS = ("prompt_encoder", "mask_decoder")


def head_rows(head: Config) -> list[Row]:
    """The table of a head: a row per array."""
    return [row for row in rows(head) if row.path.startswith(SECTIONS)]


def head_architecture(state: Mapping[str, np.ndarray], decoder_heads: int = 8) -> Config:
    """The head of a state dict: a `Config` without an image encoder, whose image size nothing tells: one patch.

    Raises:
      ValueError: an array that fixes it is missing or out of range.
    """
    layers, shape = "mask_decoder.transformer.layers.", lambda name: state[name].shape
    try:
        return Config(
            image_size=(16, 16),
            embed_dim=0,
            blocks=(),
            out_chans=shape("mask_decoder.iou_token.weight")[1],
            mask_in_chans=shape("prompt_encoder.mask_downscaling.3.weight")[0],
            decoder_heads=decoder_heads,
            decoder_mlp_dim=shape(f"{layers}0.mlp.lin1.weight")[0],
            decoder_depth=len({name.split(".")[3] for name in state if name.startswith(layers)}),
            multimask_outputs=shape("mask_decoder.mask_tokens.weight")[0] - 1,
            iou_head_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
        )
    except KeyError as missing:
        raise ValueError(f"no SAM's decoder: it has no {missing}") from None
    except IndexError as error:
        raise ValueError(f"no SAM's decoder: {error}") from None


@functools.lru_cache(maxsize=32)
def abstract_head(head: Config) -> dict[str, Any]:
    """{"prompt_encoder", "mask_decoder"} as shapes, not to be changed."""
    from slimsam_jax.models.sam import abstract_params

    params = abstract_params(dataclasses.replace(head, embed_dim=1))
    return {section: params[section] for section in SECTIONS}


def with_loader(module: str, sam: Any, path: Path) -> str:
    """The line that says how the loader beside a .pth loads it, or that it cannot."""
    height, width = sam.config.image_size
    if height != width:
        return f"{module} cannot load it: segment_anything wants square images, and its have {height} x {width} pixels"
    return f"in Python: import {module}; {module}.load({str(path)!r})"
