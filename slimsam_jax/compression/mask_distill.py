"""Runs the step `DistillMasks`: the student's masks, prompts in the loop, against the teacher's or annotated ones."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression import everything_masks, targets
from slimsam_jax.compression.mask_loop import Side, prompted_loss
from slimsam_jax.compression.mask_steps import DistillMasks
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.step_training import StepTraining
from slimsam_jax.compression.trainer import without_norms
from slimsam_jax.data import Sample
from slimsam_jax.data.prompted import MaskBatches
from slimsam_jax.distillation.step import init_state, make_optimizer, make_update
from slimsam_jax.models.encoders.layers import kernels
from slimsam_jax.models.relative_attention import Form
from slimsam_jax.models.sam import Architecture, Sam, run_encoder
from slimsam_jax.training.loop import Trainer

HEAD = ("prompt_encoder", "mask_decoder")


def distill_masks(run: Run, planned: Planned, student: Sam, previous: Sam) -> Sam:
    """Trains the student, from the step's last checkpoint if there is one; see `distill.distill`."""
    return MaskDistillation(run, planned, student).run() if planned.optimizer_steps else student


class MaskDistillation(StepTraining):
    """One training by masks, in one run folder."""

    def __init__(self, run: Run, planned: Planned, student: Sam):
        options, step = run.options, planned.step
        self.images = everything_masks.with_masks(run.images, run.teacher, masks_of(run))
        self.known = targets.embeddings(run, step, planned.optimizer_steps) if step.reads_teacher else None
        how = (run.dtype, options.accumulate, options.fsdp, options.attention, self.known is not None)
        trainer = make_trainer(student, run.teacher, step, *how)
        super().__init__(run, planned, student, trainer, step.optimizer.lr)

    def stream(self, start: int) -> MaskBatches:
        run, step, augment = self.whole, self.planned.step, self.planned.step.augment
        how = (run.batch, self.seed(), step.prompting.prompts, augment.flip, augment.crop, start, self.part())
        more = {"max_broken": run.options.broken_share(), "first": step.prompting.first, "extra": self.extra}
        return MaskBatches(self.images, run.teacher.config, *how, **more)

    def extra(self, sample: Sample, size: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
        """The teacher's embedding, where it is known: [h, w, C]."""
        return self.known(sample) if self.known else {}

    def weights(self, step: int) -> dict[str, float]:
        return self.planned.step.losses.weights()


def masks_of(run: Run) -> Path:
    """The folder of the teacher's masks: with its embeddings, however those are stored, or in the run's own folder."""
    return (run.cache.common if run.cache else run.folder.work) / everything_masks.name_of(run.teacher)


def make_trainer(
    student: Sam,
    teacher: Sam,
    step: DistillMasks,
    dtype: Any = jnp.float32,
    parts: int = 1,
    fsdp: int = 1,
    attention: Form = "auto",
    known: bool = False,
) -> Trainer:
    """Places the models on the devices and builds the step; arguments as of `trainer.make_trainer`.

    Args:
      known: whether batches bring the teacher's "embedding".
    """
    mesh = sharding.make_mesh(fsdp)
    how = step.optimizer
    optimizer = make_optimizer(how.clip, how.weight_decay, kernels)
    encode = functools.partial(run_encoder, dtype=dtype, mesh=mesh, attention=attention)
    gradients = functools.partial(_gradients, encode, step, student.config, teacher.config)
    update = make_update(gradients, optimizer, parts, how.reduction, how.ema, mesh)
    trained = {part: student.params[part] for part in step.train}
    frozen: dict[str, Any] = {"student": {part: student.params[part] for part in student.params if part not in trained}}
    if step.reads_teacher:
        frozen["teacher"] = {part: teacher.params[part] for part in HEAD}
        if not known:
            frozen["teacher"]["image_encoder"] = sharding.cast(teacher.params["image_encoder"], dtype)
    state = init_state(trained, optimizer, how.ema)
    return Trainer(update, sharding.place(state, mesh), sharding.place(frozen, mesh), mesh)


def _gradients(encode: Any, step: DistillMasks, config: Architecture, teacher: Architecture, trained, frozen, batch, w):
    """Computes ({"loss": ..., term: ...}, gradients); see `distillation.step.make_update`."""
    theirs = None
    if "teacher" in frozen:
        embedding = batch.get("embedding")
        if embedding is None:
            embedding = encode(teacher, frozen["teacher"]["image_encoder"], batch)[0]
        theirs = Side(teacher, frozen["teacher"], jax.lax.stop_gradient(embedding.astype(jnp.float32)))

    def loss(trained: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = {**frozen["student"], **trained}
        embedding = encode(*without_norms(config, params["image_encoder"]), batch)[0]
        ours = Side(config, params, embedding.astype(jnp.float32))
        value, terms = prompted_loss(step, ours, theirs, batch, w)
        return value, {"loss": value, **terms}

    grads, terms = jax.grad(loss, has_aux=True)(trained)
    return terms, grads
