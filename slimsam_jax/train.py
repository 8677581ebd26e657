"""The distilling half of a stage: a pruned SAM learns from the teacher and from the model before the cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slimsam_jax import distill, sharding
from slimsam_jax.models.config import Config
from slimsam_jax.models.features import bottleneck_features, run_encoder, stream_features
from slimsam_jax.models.sam import Sam
from slimsam_jax.recipes import Recipe, Stage

Batch = dict[str, Any]


class Trainer(NamedTuple):
    """What a stage's distillation runs on.

    Attributes:
      step: see `distill.make_step`.
      state: to start from, on the mesh.
      frozen: the parameters that targets are computed with, on the mesh.
      mesh: all devices.
    """

    step: Callable[..., tuple[distill.TrainState, dict[str, jax.Array]]]
    state: distill.TrainState
    frozen: dict[str, Any]
    mesh: Mesh


def make_trainer(
    student: Sam,
    previous: Sam,
    teacher: Sam,
    stage: Stage,
    recipe: Recipe,
    steps: int,
    dtype: Any = jnp.float32,
    parts: int = 1,
    fsdp: int = 1,
) -> Trainer:
    """Places a stage's models on the devices and builds its step.

    Args:
      previous: the model that was pruned: the teacher in stage 1, the distilled stage-1 model in stage 2.
      dtype: of the computation and of the frozen parameters; the student's own stay float32.
      parts: that each batch is taken in, see `distill.make_step`.
      fsdp: devices that parameters are split over, see `sharding`.
    """
    mesh = sharding.make_mesh(fsdp)
    optimizer = distill.make_optimizer(recipe.learning_rate, steps, recipe.schedule, recipe.clip, recipe.weight_decay)
    split = {"stage": stage, "dtype": dtype, "devices": mesh.size}
    step = distill.make_step(
        functools.partial(_student_features, config=student.config, **split),
        functools.partial(_target_features, previous=previous.config, teacher=teacher.config, **split),
        optimizer,
        recipe.relative_loss,
        parts,
        recipe.reduction,
        recipe.ema,
        mesh,
    )
    frozen = {"teacher": teacher.params["image_encoder"]}
    if stage.features == "stream":
        frozen["previous"] = previous.params["image_encoder"]
    frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), frozen)
    state = distill.init_state(student.params["image_encoder"], optimizer, recipe.ema)
    return Trainer(step, sharding.place(state, mesh), sharding.place(frozen, mesh), mesh)


def _student_features(
    encoder: Any, batch: Batch, config: Config, stage: Stage, dtype: Any, devices: int
) -> distill.Features:
    embedding, features = run_encoder(config, encoder, batch, dtype, devices)
    if stage.features == "bottleneck":
        return {"embedding": embedding, **bottleneck_features(config, features)}
    return {"embedding": embedding, "previous": embedding, **stream_features(config, features)}


def _target_features(
    frozen: Any, batch: Batch, previous: Config, teacher: Config, stage: Stage, dtype: Any, devices: int
) -> distill.Features:
    """A teacher's embedding that comes with the batch (see `teacher_cache`) is not computed again."""
    embedding, features = run_encoder(teacher, frozen["teacher"], batch, dtype, devices)
    embedding = batch.get("embedding", embedding)
    if stage.features == "bottleneck":
        return {"embedding": embedding, **bottleneck_features(teacher, features)}
    before, features = run_encoder(previous, frozen["previous"], batch, dtype, devices)
    return {"embedding": embedding, "previous": before, **stream_features(previous, features)}


def calibration(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The first `count` batches of a stream, on all devices."""
    mesh = sharding.make_mesh()
    return (sharding.shard_batch(batch, mesh) for batch in itertools.islice(batches, count))
