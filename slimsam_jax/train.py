"""The distilling half of a stage: a pruned SAM learns from the teacher and from the model before the cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from slimsam_jax import distill
from slimsam_jax.errors import RunError
from slimsam_jax.models.config import Config
from slimsam_jax.models.features import bottleneck_features, run_encoder, stream_features
from slimsam_jax.models.sam import Sam
from slimsam_jax.recipes import Recipe, Stage

Batch = dict[str, Any]


def make_trainer(student: Sam, previous: Sam, teacher: Sam, stage: Stage, recipe: Recipe, steps: int, dtype: Any):
    """The compiled step of a stage, its first state and the frozen parameters it reads.

    Args:
      previous: the model that was pruned: the teacher in stage 1, the distilled stage-1 model in stage 2.

    Returns:
      (step, state, frozen), as `distill.make_step` has them.
    """
    optimizer = distill.make_optimizer(recipe.learning_rate, steps, recipe.schedule)
    forward = functools.partial(_student_features, config=student.config, stage=stage, dtype=dtype)
    target = functools.partial(
        _target_features, previous=previous.config, teacher=teacher.config, stage=stage, dtype=dtype
    )
    weights = lambda step: stage.weights(step / steps, recipe)
    step = distill.make_step(forward, target, weights, optimizer, recipe.relative_loss)
    frozen = {"teacher": teacher.params["image_encoder"]}
    if stage.features == "stream":
        frozen["previous"] = previous.params["image_encoder"]
    return step, distill.init_state(student.params["image_encoder"], optimizer), frozen


def _student_features(encoder: Any, batch: Batch, config: Config, stage: Stage, dtype: Any) -> distill.Features:
    embedding, features = run_encoder(config, encoder, batch, dtype)
    if stage.features == "bottleneck":
        return {"embedding": embedding, **bottleneck_features(config, features)}
    return {"embedding": embedding, "previous": embedding, **stream_features(config, features)}


def _target_features(
    frozen: Any, batch: Batch, previous: Config, teacher: Config, stage: Stage, dtype: Any
) -> distill.Features:
    embedding, features = run_encoder(teacher, frozen["teacher"], batch, dtype)
    if stage.features == "bottleneck":
        return {"embedding": embedding, **bottleneck_features(teacher, features)}
    previous_embedding, features = run_encoder(previous, frozen["previous"], batch, dtype)
    return {"embedding": embedding, "previous": previous_embedding, **stream_features(previous, features)}


def train(step, state: distill.TrainState, frozen: Any, batches: Iterator[Batch], steps: int):
    """Runs a stage from wherever `state` stands; yields (state, terms) after every step.

    Raises:
      RunError: the loss is not finite; looked at a step late, so that the host runs ahead of the device.
    """
    mesh = distill.data_mesh()
    state, frozen = distill.replicate(state, mesh), distill.replicate(frozen, mesh)
    terms = None
    for done, batch in zip(range(int(state.step), steps), batches, strict=False):
        before = terms
        state, terms = step(state, frozen, distill.shard_batch(batch, mesh))
        if before:
            check_loss(before, done)
        yield state, terms


def check_loss(terms: dict[str, Any], step: int) -> None:
    """Raises RunError if the loss is not finite; waits for the step to end."""
    if not np.isfinite(terms["loss"]):
        raise RunError(f"the loss of step {step} is not finite; another --seed, --batch or --dtype may help")


def calibration(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The first `count` batches of a stream, on all devices."""
    mesh = distill.data_mesh()
    return (distill.shard_batch(batch, mesh) for batch in itertools.islice(batches, count))
