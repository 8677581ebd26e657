"""Runs the loop of a training: steps, log, validation, checkpoints, and ways to stop."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from slimsam_jax import sharding
from slimsam_jax.data.batches import Batches
from slimsam_jax.distillation.losses import Weights
from slimsam_jax.distillation.step import Step, TrainState
from slimsam_jax.errors import RunError, Stopped
from slimsam_jax.models.sam import Sam
from slimsam_jax.progress import track
from slimsam_jax.training import preemption
from slimsam_jax.training.checkpoints import Steps, shapes_of
from slimsam_jax.training.run_folder import RunFolder

# Models of best validations that are kept, so that a run which falls back by a damaged checkpoint finds its best.
BESTS = 3
ADVICE = "another --seed, --batch, --dtype or learning rate may help"


class Schedule(NamedTuple):
    """When a training takes steps, validates and saves.

    Attributes:
      name: of the training within its folder and log ("stage" there).
      title: what messages call it.
      steps: in all.
      batch: images in a step, over all processes.
      save_every: steps between two checkpoints.
      validations: how many, evenly spaced.
      keep: which model is the result; the other one is saved beside it.
      before: steps of trainings that this process has done before this one.
    """

    name: str
    title: str
    steps: int
    batch: int
    save_every: int
    validations: int
    keep: Literal["best", "last"] = "best"
    before: int = 0


class Loop(abc.ABC):
    """A training in a run folder. Subclasses define what is learnt, from what, and how it is scored."""

    def __init__(self, folder: RunFolder, trainer: Trainer, schedule: Schedule):
        self.folder, self.trainer, self.schedule = folder, trainer, schedule
        steps, count = schedule.steps, min(schedule.validations, schedule.steps)
        self.validated = {math.ceil((i + 1) * steps / count) for i in range(count)}
        self.logged = {*range(0, steps, max(1, steps // 100)), steps}
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    @abc.abstractmethod
    def stream(self, start: int) -> Batches:
        """Returns the batches from step `start` (counted from 0) on."""

    @abc.abstractmethod
    def weights(self, step: int) -> Weights:
        """Returns the weights of the loss's terms in a step, counted from 1."""

    @abc.abstractmethod
    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 1."""

    @abc.abstractmethod
    def sam(self, state: TrainState) -> Sam:
        """Returns the model as it stands, off the mesh; a collective."""

    @abc.abstractmethod
    def score(self, sam: Sam, step: int) -> dict[str, float]:
        """Scores a model: {"score": higher is better, and whatever else to log}; the same in all processes."""

    def label(self) -> str:
        """Returns the title of the progress bar."""
        return self.schedule.title.removeprefix("the ")

    def run(self) -> Sam:
        """Trains from the last checkpoint, if there is one, to the end.

        Returns:
          The best model by score, or the last.

        Raises:
          RunError: the loss is not finite, or too many images cannot be read. Checkpoints hold finite states only,
            so the last good one is kept.
          Stopped: SIGTERM came; the state is saved.
        """
        name, title, steps, batch, save_every, *_, before = self.schedule
        with preemption.on_request() as stop_asked, self.folder.steps(name) as saved:
            state, skipped = self.start(saved)
            done = int(state.step)
            self.scores = self.folder.rewind_log(name, done)
            self.batches = self.stream(done)
            self.batches.skipped.update(skipped)
            if not done and 0 in self.validated - {*self.scores}:
                self.validate(state, 0)
            rows = zip(range(done + 1, steps + 1), self.batches, strict=False)
            for step, rows_of_step in track(rows, self.label(), steps - done, per_item=batch, compiles=True):
                state = self.step(state, step, rows_of_step)
                stop = saved.asked_to_stop(before + step) or stop_asked()
                if stop or step in self.validated or step % save_every == 0:
                    self.flush()
                    self.batches.agree_on_skipped()
                    saved.check_finite(step, state)
                    if step in self.validated:
                        self.validate(state, step)
                    saved.save(step, state, dict(self.batches.skipped))
                if stop:
                    raise Stopped(f"stopped after step {step} of {title}; continue with --resume")
        self.batches.close()
        if stop_asked():  # since the last step was taken
            raise Stopped(f"stopped after step {steps} of {title}; continue with --resume")
        self.name_skipped()
        return self.result(state)

    def start(self, saved: Steps) -> tuple[TrainState, dict[str, str]]:
        """Restores the last checkpoint, or begins. Returns the state, and the images that could not be read so far."""
        state, self.trainer = self.trainer.state, self.trainer._replace(state=None)
        like = shapes_of(state)
        if saved.manager.latest_step() is None:
            return state, {}
        del state  # not twice in memory
        return saved.restore(like)

    def step(self, state: TrainState, step: int, batch: Any) -> TrainState:
        """Dispatches a step; the terms of the one before are read only now, so that the host runs ahead."""
        batch = sharding.shard_batch(batch, self.trainer.mesh)
        how = self.weights(step), self.learning_rate(step)
        state, terms = self.trainer.step(state, self.trainer.frozen, batch, *how)
        self.flush()
        self.pending = step, terms
        return state

    def flush(self) -> None:
        """Waits for the last step that was dispatched, checks its loss and logs it."""
        if not self.pending:
            return
        (step, terms), self.pending = self.pending, None
        terms = {name: float(term) for name, term in terms.items()}
        if not np.isfinite(terms["loss"]):
            names = ", ".join(sample.name for sample in self.batches.samples_of(step - 1))
            raise RunError(
                f"the loss of step {step} is not finite (images {names}); the checkpoint before is kept; {ADVICE}"
            )
        if step in self.logged:
            self.folder.log(stage=self.schedule.name, step=step, **terms)

    def validate(self, state: TrainState, step: int) -> None:
        """Scores the model, and keeps it if it is the best."""
        folder, name = self.folder, self.schedule.name
        sam = self.sam(state)
        scores = self.score(sam, step)
        before = self.best() if self.scores else step
        self.scores[step] = scores["score"]
        if self.best() == step:
            folder.save_model(name, f"best-{step}", sam)
        folder.log(stage=name, step=step, **scores)  # what is logged is saved: the start is not validated again
        for old in sorted(self.scores)[:-BESTS]:
            if old not in (self.best(), before):  # which a run that is killed now, before it is saved, goes back to
                folder.remove_model(name, f"best-{old}")

    def best(self) -> int:
        """Returns the step with the highest score."""
        return best_of(self.scores)

    def result(self, state: TrainState) -> Sam:
        name, folder = self.schedule.name, self.folder
        both = {"best": folder.load_model(name, f"best-{self.best()}"), "last": self.sam(state)}
        for part, sam in both.items():
            folder.save_model(name, part, sam)
        return both[self.schedule.keep]

    def name_skipped(self) -> None:
        """Logs the unreadable images of the steps that were taken; threads have read on, who knows how far."""
        if passed := sorted(self.batches.passed):
            print(f"{len(passed)} images had nothing to learn from, {passed[0]} among them", flush=True)
        if not self.batches.skipped:
            return
        met = self.batches.met(self.schedule.steps)
        for name, reason in sorted(dict(self.batches.skipped).items()):
            if name in met:
                self.folder.log(stage=self.schedule.name, skipped=name, reason=reason)
                print(f"skipped: {reason}", flush=True)


def best_of(scores: Mapping[int, float]) -> int:
    """Returns the step with the highest score, of {step: score}; of equals the later one, as the reference."""
    return max(scores, key=lambda step: (scores[step], step))


class Trainer(NamedTuple):
    """The compiled step of a training, with its state on the devices.

    Attributes:
      step: see `distillation.step.make_step`.
      state: to start from, on the mesh; None once it has been taken.
      frozen: the parameters that targets are computed with, on the mesh.
      mesh: all devices.
    """

    step: Step
    state: TrainState | None
    frozen: dict[str, Any]
    mesh: Mesh
