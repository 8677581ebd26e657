"""The loop of a stage's distillation: steps, log, validation, checkpoints, and ways to stop."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import distill, sharding, stopping, train
from slimsam_jax.data.batches import Batches, flip_and_crop
from slimsam_jax.errors import RunError, Stopped
from slimsam_jax.models.sam import Sam
from slimsam_jax.progress import track
from slimsam_jax.recipes import STAGES, Stage
from slimsam_jax.steps import Steps, shapes_of

if TYPE_CHECKING:
    from slimsam_jax.run import Run

# Models of best validations that are kept, so that a run which falls back by a damaged checkpoint finds its best.
BESTS = 3
ADVICE = "another --seed, --batch, --dtype or learning_rate may help"


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


class Distillation:
    """One stage, in one run folder."""

    def __init__(self, run: Run, stage: Stage, student: Sam, previous: Sam):
        options = run.options
        self.plan, self.stage, self.student = run, stage, student
        how = (run.dtype, options.accumulate, options.fsdp, options.attention)
        self.trainer = train.make_trainer(student, previous, run.teacher, stage, run.recipe, run.steps, *how)
        count = min(run.recipe.validations, run.steps)
        self.validated = {math.ceil((i + 1) * run.steps / count) for i in range(count)}
        self.logged = {*range(0, run.steps, max(1, run.steps // 100)), run.steps}
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def run(self) -> Sam:
        folder, steps, name = self.plan.folder, self.plan.steps, self.stage.name
        with stopping.on_request() as stop_asked, folder.steps(name) as saved:
            state, skipped = self.start(saved)
            done = int(state.step)
            self.scores = folder.rewind_log(name, done)
            self.batches = self.stream(done)
            self.batches.skipped.update(skipped)
            rows = zip(range(done + 1, steps + 1), self.batches, strict=False)
            for step, batch in track(rows, f"{name} stage", steps - done, per_item=self.plan.batch):
                state = self.step(state, step, batch)
                stop = saved.asked_to_stop(STAGES.index(self.stage) * steps + step) or stop_asked()
                if stop or step in self.validated or step % self.plan.options.save_every == 0:
                    self.flush()
                    self.batches.agree_on_skipped()
                    saved.check_finite(step, state)
                    state = self.validate(state, step) if step in self.validated else state
                    saved.save(step, state, dict(self.batches.skipped))
                if stop:
                    raise Stopped(f"stopped after step {step} of the {name} stage; continue with --resume")
        self.name_skipped()
        return self.result(state)

    def start(self, saved: Steps) -> tuple[distill.TrainState, dict[str, str]]:
        """The stage's last checkpoint, or its beginning; and the pictures that could not be read until then."""
        state, self.trainer = self.trainer.state, self.trainer._replace(state=None)
        like = shapes_of(state)
        if saved.manager.latest_step() is None:
            return state, {}
        del state  # not twice in memory
        return saved.restore(like)

    def stream(self, start: int) -> Batches:
        run = self.plan
        part = jax.process_index(), jax.process_count()
        augment = flip_and_crop(run.recipe.flip, run.recipe.crop)
        extra = (lambda sample: {"embedding": run.cache.read(sample)}) if run.cache else None
        size = run.teacher.config.image_size
        limit = run.options.broken_share()
        return Batches(run.images, size, run.batch, run.options.seed + 1, start, part, augment, extra, limit)

    def step(self, state: distill.TrainState, step: int, batch: Any) -> distill.TrainState:
        """Dispatches a step; what the one before has given is read only now, so that the host runs ahead."""
        weights = self.stage.terms(step - 1, self.plan.steps, self.plan.recipe)
        batch = sharding.shard_batch(batch, self.trainer.mesh)
        state, terms = self.trainer.step(state, self.trainer.frozen, batch, weights)
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
            self.plan.folder.log(stage=self.stage.name, step=step, **terms)

    def validate(self, state: distill.TrainState, step: int) -> distill.TrainState:
        """Scores the student, keeps it if it is the best, and sets the learning rate after a plateau."""
        folder, name = self.plan.folder, self.stage.name
        sam = self.sam(state)
        score = sharding.agree(self.plan.score(sam) if self.plan.score else 0.0)
        if not np.isfinite(score):
            raise RunError(f"the student after step {step} gives no finite embeddings; {ADVICE}")
        self.scores[step] = score
        folder.log(stage=name, step=step, score=score)
        if self.best() == step:
            folder.save_model(name, f"best-{step}", sam)
        for old in sorted(self.scores)[:-BESTS]:
            if old != self.best():
                folder.remove_model(name, f"best-{old}")
        if self.plan.recipe.schedule != "plateau":
            return state
        scale = distill.plateau_scale(list(self.scores.values()), self.stage.patience)
        return state._replace(scale=jax.device_put(jnp.float32(scale), state.scale.sharding))

    def sam(self, state: distill.TrainState) -> Sam:
        """The student as it stands, off the mesh."""
        encoder = jax.tree.map(jnp.asarray, sharding.gather(state.average or state.params))
        return dataclasses.replace(self.student, params={**self.student.params, "image_encoder": encoder})

    def best(self) -> int:
        """The step with the highest score; of equals the later one, as the reference."""
        return max(self.scores, key=lambda step: (self.scores[step], step))

    def result(self, state: distill.TrainState) -> Sam:
        name, folder = self.stage.name, self.plan.folder
        both = {"best": folder.load_model(name, f"best-{self.best()}"), "last": self.sam(state)}
        for part, sam in both.items():
            folder.save_model(name, part, sam)
        return both[self.plan.recipe.keep]

    def name_skipped(self) -> None:
        """Those that a step would have had; threads have read on, who knows how far."""
        met = {sample.name for step in range(self.plan.steps) for sample in self.batches.samples_of(step)}
        for name, reason in sorted(dict(self.batches.skipped).items()):
            if name in met:
                self.plan.folder.log(stage=self.stage.name, skipped=name, reason=reason)
                print(f"skipped: {reason}", flush=True)
