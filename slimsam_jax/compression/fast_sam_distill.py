"""Distils a FastSAM: all that the network gives, before anything is decoded, towards what the teacher gives.

A `distill.Distillation` with other terms. Layers in between are not compared: behind a cut none is as wide as before.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression.distill import JUDGED, Distillation, mean_of_some
from slimsam_jax.compression.fast_sam import Square
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.validation import Score, mean_of, validator
from slimsam_jax.data import Sample
from slimsam_jax.data.augment import flip_and_crop
from slimsam_jax.data.batches import Batches
from slimsam_jax.data.reading import map_readable
from slimsam_jax.distillation.losses import Features, Weights
from slimsam_jax.distillation.step import init_state, make_optimizer, make_step
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.models.encoders.layers import kernels, recalibrate
from slimsam_jax.models.fast_sam import Config, FastSam, Network, Outputs
from slimsam_jax.training.loop import Trainer

TERMS = Outputs._fields  # boxes, scores, coefficients and prototypes; of each the levels together


def distill(run: Run, planned: Planned, student: FastSam, previous: FastSam) -> FastSam:
    """As `distill.distill`."""
    if not planned.optimizer_steps:
        return recalibrated(run, planned, student)
    return FastSamDistillation(run, planned, student, previous).run()


def features(config: Config, dtype: Any, params: Any, images: jax.Array) -> Features:
    """{term: what the network gives} of images [b, H, W, 3] uint8."""
    pixels = images.astype(jnp.float32) / 255
    return Network(config, dtype).apply({"params": params}, pixels)[0]._asdict()


@functools.partial(jax.jit, static_argnums=0)
def outputs_of(config: Config, params: Any, images: jax.Array) -> Features:
    """`features` in float32, compiled once for a model."""
    return features(config, jnp.float32, params, images)


def errors(student: FastSam, sample: Sample, wanted: Features) -> dict[str, float]:
    """{term: the squared error of an image, relative to the variance of what is wanted}."""
    found = outputs_of(student.config, student.params, Square(student.config.image_size).place(sample.image())[0][None])
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    return {name: relative_error(flat(found[name]), flat(wanted[name])) for name in TERMS}


def wanted_of(teacher: FastSam, sample: Sample) -> Features:
    """What a teacher gives of an image, on the host."""
    frame = Square(teacher.config.image_size).place(sample.image())[0][None]
    return jax.device_get(outputs_of(teacher.config, teacher.params, frame))


def validator_of(
    teacher: FastSam, samples: Sequence[Sample], measure: str, unread: dict[str, str] | None = None
) -> Score:
    """As `validation.validator`; the "error" is the mean over terms, of the first `JUDGED` images that can be read.

    Of so many the teacher's outputs are kept, 17 MB each at 1024 px.
    """
    if measure != "error":
        return validator(teacher, samples, measure, unread)
    known, skipped = map_readable(functools.partial(wanted_of, teacher), samples[:JUDGED])
    if not known:
        raise InputError(f"no image can be validated on: {next(iter(skipped.values()))}")
    return mean_of(lambda sam, *pair: [-error for error in errors(sam, *pair).values()], known, unread)


def recalibrated(run: Run, planned: Planned, student: FastSam) -> FastSam:
    """With batch norms whose statistics are of the run's images, as `distill.recalibrated`."""
    if planned.step.batch_norm == "frozen" or planned.before:
        return student
    options, frame = run.options, Square(student.config.image_size)
    count = max(1, min(options.importance_images, len(run.images)) // run.batch)
    batches = Batches(run.images, frame.size, run.batch, options.seed, frame=frame)
    pixels = (batch["image"].astype(np.float32) / 255 for batch in itertools.islice(batches, count))
    try:
        return dataclasses.replace(student, params=recalibrate(Network(student.config), student.params, pixels))
    finally:
        batches.close()


class FastSamDistillation(Distillation):
    """One distillation of a FastSAM, in one run folder."""

    def begun(self, run: Run, planned: Planned, student: FastSam) -> FastSam:
        return recalibrated(run, planned, student)

    def starting_error(self, run: Run, student: FastSam) -> float:
        """The mean over terms, of some of the images to learn from."""
        of = lambda sample: float(np.mean(list(errors(student, sample, wanted_of(run.teacher, sample)).values())))
        return mean_of_some(run, of)

    def trained(self, run: Run, student: FastSam, previous: FastSam) -> Trainer:
        step, options = self.distill, run.options
        mesh, how = sharding.make_mesh(options.fsdp), step.optimizer
        optimizer = make_optimizer(how.clip, how.weight_decay, kernels)
        of = lambda model: functools.partial(features, model.config, run.dtype)
        slim, teacher = of(student), of(run.teacher)
        train_step = make_step(
            lambda params, frozen, batch: slim(params, batch["image"]),
            lambda frozen, batch: teacher(frozen, batch["image"]),
            optimizer,
            step.losses.relative,
            options.accumulate,
            how.reduction,
            how.ema,
            mesh,
        )
        frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf, run.dtype), run.teacher.params)
        state = init_state(student.params, optimizer, how.ema)
        return Trainer(train_step, sharding.place(state, mesh), sharding.place(frozen, mesh), mesh)

    def stream(self, start: int) -> Batches:
        run, augment = self.whole, self.distill.augment
        frame, framing = Square(run.teacher.config.image_size), flip_and_crop(augment.flip, augment.crop)
        limit = run.options.broken_share()
        return Batches(run.images, frame.size, run.batch, self.seed(), start, (0, 1), framing, None, limit, frame=frame)

    def weights(self, step: int) -> Weights:
        """All alike: the loss is the mean of the terms."""
        return dict.fromkeys(TERMS, 1 / len(TERMS))
