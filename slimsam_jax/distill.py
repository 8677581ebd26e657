"""Distillation on trees: a student's features approach a target's. Knows neither Flax nor SAM.

Features are dicts of trees of arrays. A term of the loss compares what student and target
hold under one key; having two separate dicts, a term cannot compare the student with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = Any
Features = dict[str, Tree]


class TrainState(NamedTuple):
    params: Tree
    opt_state: Tree
    step: jax.Array


def mse(student: Tree, target: Tree, relative: bool = False) -> jax.Array:
    """Mean squared error over all elements of two trees of equal structure, as if concatenated.

    Args:
      relative: divide by the variance of the target's elements (1 = as bad as their mean).
    """
    count = float(sum(leaf.size for leaf in jax.tree.leaves(target)))  # may be more than an int32 holds
    if count == 0:
        return jnp.zeros(())  # a kind of feature that this model has none of
    total = lambda tree: sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree))
    error = total(jax.tree.map(lambda s, t: jnp.square(s.astype(jnp.float32) - t), student, target)) / count
    if not relative:
        return error
    mean = total(target) / count
    return error / (total(jax.tree.map(lambda t: jnp.square(t.astype(jnp.float32) - mean), target)) / count)


def distillation_loss(student: Features, target: Features, weights: dict[str, Any], relative: bool = False):
    """Weighted sum of `mse` over the keys of `weights`. Returns it and {key: unweighted term}.

    Raises:
      ValueError: the keys of the three differ.
    """
    if not set(weights) == set(student) == set(target):
        raise ValueError(f"terms {sorted(weights)}, student {sorted(student)} and target {sorted(target)} differ")
    terms = {key: mse(student[key], target[key], relative) for key in weights}
    return sum(weights[key] * terms[key] for key in weights), terms


def make_step(
    forward: Callable[[Tree, Tree], Features],
    target: Callable[[Tree, Tree], Features],
    weights: Callable[[jax.Array], dict[str, jax.Array]],
    optimizer: optax.GradientTransformation,
    relative: bool = False,
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the compiled training step; call it once per stage.

    Args:
      forward: (student's params, batch) -> features.
      target: (frozen params, batch) -> features of the same keys.
      weights: step -> weight of each key.
      optimizer: optax.
      relative: see `mse`.

    Returns:
      (state, frozen, batch) -> (state, {"loss": ..., term: ...}). The state is donated.
      With a batch sharded over devices and a replicated state, XLA averages the gradients.
    """

    def step(state: TrainState, frozen: Tree, batch: Tree):
        wanted = jax.lax.stop_gradient(target(frozen, batch))

        def loss_fn(params):
            return distillation_loss(forward(params, batch), wanted, weights(state.step), relative)

        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        return state, {"loss": loss, **terms}

    return jax.jit(step, donate_argnums=0)


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    # Copied, because the step donates its state and the caller may want the start again.
    params = jax.tree.map(jnp.array, params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_optimizer(learning_rate: float, steps: int, schedule: str = "cosine") -> optax.GradientTransformation:
    """Adam; "cosine" warms up over 5 % of the steps and falls to zero, "constant" is the reference's."""
    if schedule == "constant":
        return optax.adam(learning_rate)
    warm_up = max(1, steps // 20)
    first = learning_rate / warm_up
    return optax.adam(optax.warmup_cosine_decay_schedule(first, learning_rate, warm_up, max(steps, warm_up + 1)))


def data_mesh() -> jax.sharding.Mesh:
    """All devices of this process along one axis, "data"."""
    # Auto axes: make_mesh's default since jax 0.10 is Explicit, which asks more of every operation.
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shard_batch(batch: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Splits a host batch over the devices along its first axis."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicate(tree: Tree, mesh: jax.sharding.Mesh) -> Tree:
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
