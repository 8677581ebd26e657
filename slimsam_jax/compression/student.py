"""The student that a recipe begins with, if it is not the teacher itself: its architecture and its first weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.steps import Initialize, Recipe, Step
from slimsam_jax.errors import InputError
from slimsam_jax.limits import quoted
from slimsam_jax.models.composed import with_encoder
from slimsam_jax.models.encoders import presets
from slimsam_jax.models.sam import Architecture, Params, Sam, image_encoder
from slimsam_jax.progress import say


def is_path(student: Path | None) -> bool:
    """Whether it names a model, and no preset; raises InputError if it names neither."""
    if student is None or str(student) in presets.NAMES:
        return False
    if not student.exists():
        raise InputError(f"--student {quoted(student)} is no model's path, and no preset: {', '.join(presets.NAMES)}")
    return True


def resolved(recipe: Recipe, student: str | Sam | None, config: Architecture) -> Recipe:
    """The recipe with architectures in place of presets' names.

    Args:
      student: a preset's name, or a model, whose encoder the steps that initialize another one shall take; None for
        the recipe's own.
      config: the teacher's.

    Raises:
      InputError: there is no such preset, it does not fit the teacher, or the recipe initializes none.
    """
    chosen = student.config.encoder if isinstance(student, Sam) else student
    takes = lambda step: begins_anew([step])
    if student is not None and not begins_anew(recipe):
        raise InputError("--student is for recipes that begin with another encoder, such as mobile_sam")
    return tuple(_resolved(step, chosen, config) if takes(step) else step for step in recipe)


def _resolved(step: Initialize, chosen: Any, config: Architecture) -> Initialize:
    encoder = step.encoder if chosen is None else chosen
    if not isinstance(encoder, str):
        return dataclasses.replace(step, encoder=encoder)
    try:
        return dataclasses.replace(step, encoder=presets.encoder(encoder, config))
    except ValueError as error:
        raise InputError(f"the student {quoted(encoder)} cannot be made: {error}") from None


def begins_anew(recipe: Iterable[Step]) -> bool:
    """Whether a recipe goes on with another encoder than the teacher's."""
    return any(isinstance(step, Initialize) and step.encoder is not None for step in recipe)


def say_if_larger(student: int, teacher: int) -> None:
    """Says it where a student has as many parameters as its teacher or more, which nobody wants of a slim model."""
    if student >= teacher:
        sizes = f"{student / 1e6:.2f} M parameters, no fewer than the teacher's {teacher / 1e6:.2f} M"
        say("student", f"{sizes}: --student tiny_vit_small gives a smaller one")


def initialize(run: Run, planned: Planned, student: Sam, previous: Sam) -> Sam:
    """The step `Initialize`: an image encoder of the same widths or of the step's own, with its first weights."""
    config = student.config if planned.step.encoder is None else with_encoder(student.config, planned.step.encoder)
    images = jnp.zeros((1, *config.image_size, 3))
    encoder = jax.jit(image_encoder(config).init)(jax.random.key(run.options.seed), images)["params"]
    if planned.step.encoder is not None and run.start:
        encoder = where_they_agree(encoder, run.start.params["image_encoder"])
    elif planned.step.start == "teacher":
        encoder = where_they_agree(encoder, run.teacher.params["image_encoder"])
    return dataclasses.replace(student, config=config, params={**student.params, "image_encoder": encoder}, kept={})


def where_they_agree(params: Params, given: Params) -> Params:
    """`params` with those arrays of `given` that have the same path and shape."""
    ours, theirs = flatten_dict(params), flatten_dict(given)
    agree = lambda path: path in theirs and theirs[path].shape == ours[path].shape
    taken = {path for path in ours if agree(path)}
    print(f"the student starts with {len(taken)} of its {len(ours)} arrays from there", flush=True)
    return unflatten_dict({path: jnp.asarray(theirs[path]) if path in taken else ours[path] for path in ours})
