"""Builds the compiled training step of any distillation, on trees. Knows neither Flax nor SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from slimsam_jax import sharding
from slimsam_jax.distillation.losses import Features, Tree, Weights, distillation_loss

Step = Callable[["TrainState", Tree, Tree, Weights, float], tuple["TrainState", dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """The state of a training, which a step changes.

    Attributes:
      average: exponential moving average of `params`; None without one.
    """

    params: Tree
    opt_state: Tree
    average: Tree
    step: jax.Array


def make_step(
    forward: Callable[[Tree, Tree, Tree], Features],
    target: Callable[[Tree, Tree], Features],
    optimizer: optax.GradientTransformation,
    relative: bool = False,
    parts: int = 1,
    reduction: Literal["mean", "sum"] = "mean",
    ema: float = 0.0,
    mesh: Mesh | None = None,
) -> Step:
    """Builds the compiled training step.

    Args:
      forward: (student's params, frozen params, batch) -> features.
      target: (frozen params, batch) -> features of the same keys.
      optimizer: optax, at a learning rate of 1: updates are multiplied by the step's.
      relative: see `mse`.
      parts: the batch is taken in so many parts, one after the other, and their gradients averaged: less memory,
        the same result but for rounding (and for `relative`, whose variances are then each part's, as is whatever else
        a loss takes from its whole batch).
      reduction: "sum" multiplies the gradients by the number of images, as if their losses were added up.
      ema: share of the moving average that stays at each step; 0 for none.
      mesh: keeps the state split as `sharding.place` split it.

    Returns:
      (state, frozen, batch, weights of the terms, learning rate) -> (state, {"loss": ..., term: ...}). The state is
      donated. What only serves terms that `weights` does not name is not computed; each set of names is compiled once,
      whatever weights and learning rates.
    """

    def gradients(params: Tree, frozen: Tree, batch: Tree, weights: Weights):
        targets = jax.lax.stop_gradient(target(frozen, batch))

        def loss_fn(params):
            loss, terms = distillation_loss(forward(params, frozen, batch), targets, weights, relative)
            return loss, {"loss": loss, **terms}

        grads, terms = jax.grad(loss_fn, has_aux=True)(params)
        return terms, grads

    return make_update(gradients, optimizer, parts, reduction, ema, mesh)


def make_update(
    gradients: Callable[[Tree, Tree, Tree, Weights], tuple[dict[str, jax.Array], Tree]],
    optimizer: optax.GradientTransformation,
    parts: int = 1,
    reduction: Literal["mean", "sum"] = "mean",
    ema: float = 0.0,
    mesh: Mesh | None = None,
) -> Step:
    """Builds the compiled step of any training.

    Args:
      gradients: (params, frozen params, batch, weights of the terms) -> ({"loss": ..., term: ...}, gradients), means
        over the batch.
      optimizer, parts, reduction, ema, mesh: see `make_step`, which returns the like.
    """

    def step(state: TrainState, frozen: Tree, batch: Tree, weights: Weights, learning_rate: float):
        images = len(jax.tree.leaves(batch)[0])
        some = lambda part: gradients(state.params, frozen, part, weights)
        terms, grads = some(batch) if parts == 1 else _mean_over(some, _split(batch, parts))
        if reduction == "sum":
            grads = jax.tree.map(lambda g: images * g, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: learning_rate * u, updates))
        average = optax.incremental_update(params, state.average, 1 - ema) if ema else None
        state = TrainState(params, opt_state, average, state.step + 1)
        return (sharding.constrain(state, mesh) if mesh else state), terms

    return jax.jit(step, donate_argnums=0)


def _split(batch: Tree, parts: int) -> Tree:
    """Splits [b, ...] into [parts, b / parts, ...]: the i-th of every `parts` rows.

    A device's rows lie behind one another, so that every part has some of every device, and none moves.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _mean_over(function: Callable[[Tree], Tree], parts: Tree) -> Tree:
    """Computes the mean of `function` over the leading axis, a row at a time."""
    count = len(jax.tree.leaves(parts)[0])
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, _first(parts)))
    add = lambda total, part: (jax.tree.map(lambda a, b: a + b / count, total, function(part)), None)
    return jax.lax.scan(add, start, parts)[0]


def _first(parts: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], parts)


def init_state(params: Tree, optimizer: optax.GradientTransformation, ema: float = 0.0) -> TrainState:
    def init(params: Tree) -> TrainState:
        # Copied, because the step donates its state and the caller may want the start again.
        copy = lambda: jax.tree.map(jnp.array, params)
        average = copy() if ema else None
        return TrainState(copy(), optimizer.init(params), average, jnp.zeros((), jnp.int32))

    return sharding.computed(jax.jit(init), params)  # one program, not one for each shape


def make_optimizer(
    clip: float = 0.0, weight_decay: float = 0.0, decayed: Callable[[Tree], Tree] | None = None
) -> optax.GradientTransformation:
    """Makes Adam, or AdamW if there is weight decay, at a learning rate of 1, which a step multiplies by its own.

    Args:
      clip: the largest norm of all gradients together; 0 for no limit.
      decayed: params -> a tree of bools, what weight decay is for; None for everything.
    """
    adam = optax.adamw(1.0, weight_decay=weight_decay, mask=decayed) if weight_decay else optax.adam(1.0)
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam
