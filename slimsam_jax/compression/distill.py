"""Distils: a training whose terms are those of a step `Distill`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression import targets
from slimsam_jax.compression.loss_terms import terms
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.step_training import StepTraining
from slimsam_jax.compression.trainer import make_trainer
from slimsam_jax.data import Sample
from slimsam_jax.data.augment import flip_and_crop
from slimsam_jax.data.batches import Batches
from slimsam_jax.data.prompted import random_clicks
from slimsam_jax.data.reading import map_readable
from slimsam_jax.errors import RunError
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.encoders import family_of
from slimsam_jax.models.encoders.layers import recalibrate
from slimsam_jax.models.sam import Sam, image_encoder, preprocess
from slimsam_jax.profiling import sam_costs
from slimsam_jax.training.loop import Trainer

# Multiply-accumulates of the teacher in a distillation, below which compiling a second program, without the terms
# that have faded, takes longer than it saves: 1500 images of the small SAM, four of ViT-B at 1024 px.
WORTH_A_PROGRAM = 2e12
FASTEST = 2e-3  # peak learning rate; no larger one was ever tried where it did good (0.0015 after a cut of 90 %)
JUDGED = 16  # images that the learning rate is chosen by


def distill(run: Run, planned: Planned, student: Sam, previous: Sam) -> Sam:
    """Trains the student, from the step's last checkpoint if there is one.

    Args:
      previous: the model before the last cut, with whose features the student's are aligned.

    Returns:
      The best student by validation, or the last, as the step says; without steps the student, its batch norms
      recalibrated if that is asked for.

    Raises:
      RunError: the loss is not finite, or too many images cannot be read. Checkpoints hold finite states only, so
        the last good one is kept.
      Stopped: SIGTERM came; the state is saved.
    """
    if not planned.optimizer_steps:
        return recalibrated(run, planned, student)
    return Distillation(run, planned, student, previous).run()


def starting_error(run: Run, student: Sam) -> float:
    """The error of the embedding relative to its variance, over some of the images to learn from."""

    def of(sample: Sample) -> float:
        image = sample.image()
        found, wanted = (encode_image(sam, image).embedding for sam in (student, run.teacher))
        return relative_error(found, wanted)

    return mean_of_some(run, of)


def mean_of_some(run: Run, of: Callable[[Sample], float]) -> float:
    """The mean of a number over some of the images to learn from; raises RunError if none can be read."""
    found, skipped = map_readable(of, run.images[:: -(-len(run.images) // JUDGED)])
    if not found:
        raise RunError(f"not one of {len(skipped)} images can be read, such as {next(iter(skipped.values()))}")
    return float(np.mean(list(found.values())))


def recalibrated(run: Run, planned: Planned, student: Sam) -> Sam:
    """With batch norms whose statistics are of the run's images, if that is asked for and no weight has moved yet.

    Every process takes the same images, so that all have the same statistics.
    """
    if planned.step.batch_norm == "frozen" or planned.before:
        return student
    if planned.step.batch_norm == "auto" and run.start:  # its weights have learned with the statistics that they have
        return student
    if not getattr(student.config.encoder, "batch_norm", False):  # "recalibrated" was refused (`prepare`)
        return student
    options, size = run.options, student.config.image_size
    count = max(1, min(options.importance_images, len(run.images)) // run.batch)
    batches = Batches(run.images, size, run.batch, options.seed, frame=student.config.frame)
    taken = itertools.islice(batches, count)
    pixels = (preprocess(student.config, batch["image"], batch["size"]) for batch in taken)
    try:
        encoder = recalibrate(image_encoder(student.config), student.params["image_encoder"], pixels)
    finally:
        batches.close()
    return dataclasses.replace(student, params={**student.params, "image_encoder": encoder})


def peak_rate(run: Run, planned: Planned, error: Callable[[], float]) -> float:
    """The peak learning rate, if "auto" as logged where the step began in a run that is resumed.

    Args:
      error: measures the relative error that the step starts with.
    """
    folder, name, optimizer = run.folder, "learning_rate", planned.step.optimizer
    if optimizer.lr != "auto":
        return optimizer.lr
    for entry in folder.read_log():
        if entry.get("stage") == planned.name and name in entry:
            return entry[name]
    found = optimizer.auto_lr * error() ** 0.5
    found = sharding.agree(min(found, FASTEST))
    folder.log(stage=planned.name, step=0, **{name: found})
    return found


class Distillation(StepTraining):
    """One distillation, in one run folder."""

    def __init__(self, run: Run, planned: Planned, student: Sam, previous: Sam):
        self.steps, self.distill = planned.optimizer_steps, planned.step
        student = self.begun(run, planned, student)
        peak = peak_rate(run, planned, functools.partial(self.starting_error, run, student))
        super().__init__(run, planned, student, self.trained(run, student, previous), peak)

    def begun(self, run: Run, planned: Planned, student: Sam) -> Sam:
        """The student before its first step."""
        return recalibrated(run, planned, student)

    def starting_error(self, run: Run, student: Sam) -> float:
        """The relative error that the learning rate is chosen by, if it is "auto"."""
        return starting_error(run, student)

    def trained(self, run: Run, student: Sam, previous: Sam) -> Trainer:
        """The compiled step, with what it computes targets by."""
        step, options = self.distill, run.options
        work = self.steps * run.batch * sam_costs.encoder_macs(run.teacher.config).total
        self.names = family_of(student.config.encoder).FEATURES
        every = [terms(step, index, self.steps, self.names) for index in range(self.steps)]
        names = sorted(set(itertools.chain.from_iterable(every)))
        self.faded = dict.fromkeys(names, 0.0) if work < WORTH_A_PROGRAM else {}
        self.targets = targets.remembered(run, step, self.steps, previous, names)
        how = (run.dtype, options.accumulate, options.fsdp, options.attention, self.targets is not None)
        return make_trainer(student, previous, run.teacher, step, *how)

    def stream(self, start: int) -> Batches:
        run, augment = self.whole, self.distill.augment
        config, limit = run.teacher.config, run.options.broken_share()
        framing = flip_and_crop(augment.flip, augment.crop)
        how = (run.batch, self.seed(), start, self.part(), framing, self.extra, limit)
        return Batches(run.images, config.image_size, *how, frame=config.frame)

    def extra(self, sample: Sample, size: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
        """What a step needs of an image besides its pixels."""
        found: dict[str, Any] = {}
        if self.targets:
            found["targets"] = self.targets(sample)
        elif self.whole.cache:
            found["embedding"] = self.whole.cache.read(sample)
        losses = self.distill.losses
        return found | (random_clicks(size, losses.points, random) if losses.masks else {})

    def weights(self, step: int) -> dict[str, float]:
        """A short distillation computes all of its terms to the end, some at weight 0."""
        return self.faded | terms(self.distill, step - 1, self.steps, self.names)
