"""Runs of the main command, and a student for its parts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import ModuleType

import pytest

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


@contextlib.contextmanager
def compiled_once(*modules: ModuleType) -> Iterator[None]:
    """Each training that these modules build again, of the same shapes and step, runs the program of the first."""
    programs = {}
    with pytest.MonkeyPatch.context() as patched:
        for module in modules:

            def make(*models_and_step, make=module.make_trainer, name=module.__name__, **how):
                built = make(*models_and_step, **how)
                given = [each.config if isinstance(each, Sam) else each for each in models_and_step]
                return built._replace(step=programs.setdefault(repr([name, given, how]), built.step))

            patched.setattr(module, "make_trainer", make)
        yield


def shaken(sam: Sam) -> Sam:
    encoder = {**sam.params["image_encoder"], "pos_embed": sam.params["image_encoder"]["pos_embed"] + 0.3}
    return dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder})
