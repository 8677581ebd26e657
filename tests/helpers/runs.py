"""Runs of the main command, and a student for its parts."""

from __future__ import annotations

import dataclasses

from slimsam_jax.compression.options import Options
from slimsam_jax.models.sam import Sam


def compress_options(material, out, **changes) -> Options:
    """Of a run of two stages of four steps, validated and saved every second one."""
    fields = {
        "teacher": material / "teacher",
        "images": (material / "images",),
        "val": (material / "val",),
        "steps": 4,
        "batch": 2,
        "save_every": 2,
        "set": ("validations=2", "alternate=true"),
        "out": out,
    }
    return Options(**{**fields, **changes})


def shaken(sam: Sam) -> Sam:
    encoder = {**sam.params["image_encoder"], "pos_embed": sam.params["image_encoder"]["pos_embed"] + 0.3}
    return dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder})
