"""Runs of the main command, and a student for its parts."""

from __future__ import annotations

import dataclasses

from slimsam_jax.compression.options import Options
from slimsam_jax.models.sam import Sam

PROJECTED = ("prune.criterion=projection", "prune.allocation=macs", "distill.lr=auto")
ALTERNATING = {"recipe": "taylor", "set": ("distill.validations=2", *PROJECTED)}


def compress_options(material, out, **changes) -> Options:
    """Of a run that distils after each of its two cuts, four steps each, validated and saved every second one.

    Another recipe or other choices are those of the default recipe, which distils once.
    """
    once = {"recipe": "default", "set": ("distill.validations=2",)}
    fields = {
        "teacher": material / "teacher",
        "images": (material / "images",),
        "val": (material / "val",),
        "steps": 4,
        "batch": 2,
        "save_every": 2,
        "out": out,
    }
    return Options(**{**fields, **(once if {"recipe", "set"} & {*changes} else ALTERNATING), **changes})


def shaken(sam: Sam) -> Sam:
    encoder = {**sam.params["image_encoder"], "pos_embed": sam.params["image_encoder"]["pos_embed"] + 0.3}
    return dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder})
