"""Computes losses between features of a student and of its targets. Knows neither Flax nor SAM.

Features are dicts of trees of arrays. A term of the loss compares what student and target hold under one key; having
two separate dicts, a term cannot compare the student with itself. Which terms there are, and their weights, is said in
`compression.loss_terms`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Features = dict[str, Tree]
Weights = dict[str, float]


def mse(student: Tree, target: Tree, relative: bool = False) -> jax.Array:
    """Computes the mean squared error over all elements of two trees of equal structure, as if concatenated.

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


def map_mse(student: Tree, target: Tree, relative: bool = False) -> jax.Array:
    """Computes `mse`; of a dict of several maps, such as an embedding of three scales, the mean of theirs."""
    if not isinstance(target, dict):
        return mse(student, target, relative)
    return sum(mse(student[name], target[name], relative) for name in target) / len(target)


def absolute_error(
    student: jax.Array, target: jax.Array, weight: jax.Array | float = 1.0, valid: jax.Array | float = 1.0
) -> jax.Array:
    """Computes the mean absolute error, relative to the target's mean distance from its mean (1 = as bad as that).

    Args:
      weight: of each element, of a shape that broadcasts; 1 for all.
      valid: share of each element that counts, in all three means; 0 for padding.
    """
    valid = jnp.asarray(valid, jnp.float32)
    count = jnp.maximum(valid.sum() * (target.size / valid.size), 1e-12)
    mean = lambda x: (valid * x).sum() / count
    scale = mean(jnp.abs(target - mean(target)))
    return mean(weight * jnp.abs(student.astype(jnp.float32) - target)) / jnp.maximum(scale, 1e-12)


def distillation_loss(student: Features, target: Features, weights: Weights, relative: bool = False):
    """Sums `map_mse` over the keys of `weights`, weighted. Returns the sum and {key: unweighted term}.

    Raises:
      ValueError: student or target lack a key.
    """
    if not set(weights) <= set(student) & set(target):
        raise ValueError(f"terms {sorted(weights)}, student {sorted(student)} and target {sorted(target)} differ")
    terms = {key: map_mse(student[key], target[key], relative) for key in weights}
    return sum(weights[key] * terms[key] for key in weights), terms
