"""The distillation of a stage: the loop of `training.loop` with the terms, the scores and the schedule of a recipe."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression import targets
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.steps import Stage
from slimsam_jax.compression.trainer import make_trainer
from slimsam_jax.data import Sample
from slimsam_jax.data.augment import flip_and_crop
from slimsam_jax.data.batches import Batches
from slimsam_jax.data.prompted import random_clicks
from slimsam_jax.data.reading import map_readable
from slimsam_jax.distillation.schedules import learning_rates, plateau_scale
from slimsam_jax.distillation.step import TrainState
from slimsam_jax.errors import RunError
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import reference_macs
from slimsam_jax.training.loop import ADVICE, Loop, Schedule

# Multiply-accumulates of the teacher in a stage, below which compiling a second program, without the terms that have
# faded, takes longer than it saves: 1500 images of the small SAM, four of ViT-B at 1024 px.
WORTH_A_PROGRAM = 2e12
FASTEST = 2e-3  # peak learning rate; no larger one was ever tried where it did good (0.0015 after a cut of 90 %)
JUDGED = 16  # images that a stage's learning rate is chosen by


def distil(run: Run, stage: Stage, student: Sam, previous: Sam) -> Sam:
    """Trains the student, from the stage's last checkpoint if there is one.

    Returns:
      The best student by validation, or the last, as the recipe says.

    Raises:
      RunError: the loss is not finite, or too many pictures cannot be read. Checkpoints hold finite states only, so
        the last good one is kept.
      Stopped: SIGTERM came; the state is saved.
    """
    return Distillation(run, stage, student, previous).run()


def starting_error(run: Run, student: Sam) -> float:
    """The error of the embedding relative to its variance, over some of the images to learn from."""

    def of(sample: Sample) -> float:
        image = sample.image()
        found, wanted = (encode_image(sam, image).embedding for sam in (student, run.teacher))
        return relative_error(found, wanted)

    found, skipped = map_readable(of, run.images[:: -(-len(run.images) // JUDGED)])
    if not found:
        raise RunError(f"not one of {len(skipped)} images can be read, such as {next(iter(skipped.values()))}")
    return float(np.mean(list(found.values())))


class Distillation(Loop):
    """One stage, in one run folder."""

    def __init__(self, run: Run, stage: Stage, student: Sam, previous: Sam):
        options, recipe = run.options, run.recipe
        self.whole, self.stage, self.student = run, stage, student
        self.steps = run.steps_of(stage)
        work = self.steps * run.batch * reference_macs.encoder_macs(run.teacher.config).total
        every = [stage.terms(step, self.steps, recipe) for step in range(self.steps)]
        names = sorted(set(itertools.chain.from_iterable(every)))
        self.faded = dict.fromkeys(names, 0.0) if work < WORTH_A_PROGRAM else {}
        self.targets = targets.remembered(run, stage, previous, names)
        how = (run.dtype, options.accumulate, options.fsdp, options.attention, self.targets is not None)
        self.rates = learning_rates(recipe.learning_rate or self.peak(), self.steps, recipe.schedule)
        trainer = make_trainer(student, previous, run.teacher, stage, recipe, *how)
        fields = (self.steps, run.batch, options.save_every, recipe.validations, recipe.keep, run.steps_before(stage))
        super().__init__(run.folder, trainer, Schedule(stage.name, f"the {stage.name} stage", *fields))

    def peak(self) -> float:
        """The peak learning rate by `Recipe.pace`; as logged, where the stage began in a run that is resumed."""
        folder, name = self.whole.folder, "learning_rate"
        for entry in folder.read_log():
            if entry.get("stage") == self.stage.name and name in entry:
                return entry[name]
        found = self.whole.recipe.pace * starting_error(self.whole, self.student) ** 0.5
        found = sharding.agree(min(found, FASTEST))
        folder.log(stage=self.stage.name, step=0, **{name: found})
        return found

    def label(self) -> str:
        return f"{self.stage.name}: distilling"

    def stream(self, start: int) -> Batches:
        run, seed = self.whole, self.whole.options.seed + 1 + self.stage.order
        part = jax.process_index(), jax.process_count()
        augment = flip_and_crop(run.recipe.flip, run.recipe.crop)
        size = run.teacher.config.image_size
        limit = run.options.broken_share()
        return Batches(run.images, size, run.batch, seed, start, part, augment, self.extra, limit)

    def extra(self, sample: Sample, size: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
        """What a step needs of a picture besides its pixels."""
        found: dict[str, Any] = {}
        if self.targets:
            found["targets"] = self.targets(sample)
        elif self.whole.cache:
            found["embedding"] = self.whole.cache.read(sample)
        recipe = self.whole.recipe
        return found | (random_clicks(size, recipe.points, random) if recipe.masks else {})

    def weights(self, step: int) -> dict[str, float]:
        """A short stage computes all of its terms to the end, some at weight 0."""
        return self.faded | self.stage.terms(step - 1, self.steps, self.whole.recipe)

    def score(self, sam: Sam, step: int) -> dict[str, float]:
        score = sharding.agree(self.whole.score(sam) if self.whole.score else 0.0)
        if not np.isfinite(score):
            raise RunError(f"the student after step {step} gives no finite embeddings; {ADVICE}")
        return {"score": score}

    def learning_rate(self, step: int) -> float:
        """By the schedule, and by the validations until now if that is "plateau"."""
        rate = float(self.rates[step - 1])
        if self.whole.recipe.schedule != "plateau":
            return rate
        return rate * plateau_scale(list(self.scores.values()), self.stage.patience)

    def sam(self, state: TrainState) -> Sam:
        """The student as it stands, off the mesh."""
        # Copied on the host, which compiles nothing: the next step is given the state's memory.
        learnt = jax.device_put(jax.tree.map(np.array, sharding.gather(state.average or state.params)))
        return dataclasses.replace(self.student, params={**self.student.params, **learnt})
