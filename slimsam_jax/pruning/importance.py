"""Parameters and gradients -> a score per channel.

Disturbed Taylor importance (SlimSAM, section 3.3): the gradient is that of the MSE between
a model's embedding and the same embedding plus Gaussian noise, so no labels are needed and
the goal of pruning is that of distilling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.pruning.group import Group, Scores, Tree, by_path

Criterion = Literal["taylor", "magnitude", "random"]

# Importance of each single weight, from the weight and its gradient.
CRITERIA: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "taylor": lambda weight, grad: jnp.abs(weight * grad),
    "magnitude": lambda weight, grad: weight**2,
}

# Makes the scores of different groups comparable before they compete (reference: importance.py:350-366).
NORMALIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda s: s,
    "sum": lambda s: s / s.sum(),
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "minmax": lambda s: (s - s.min()) / (s.max() - s.min() + 1e-8),
    "gaussian": lambda s: (s - s.mean()) / (s.std(ddof=1) + 1e-8),
}


def channel_scores(
    params: Tree, grads: Tree, groups: Sequence[Group], criterion: Criterion = "taylor", seed: int = 0
) -> Scores:
    """Scores every channel of every group.

    A member's score of a channel sums the weights in the channel's slice; a group's is the
    mean over its voting members.

    Args:
      params, grads: trees of equal structure. "magnitude" and "random" do not read the gradients.
      groups: channels to score.
      criterion: "taylor" (with the disturbed gradient: Disturbed Taylor), "magnitude" or "random".
      seed: for "random".

    Returns:
      {group name: [size] float64}.
    """
    if criterion == "random":
        random = np.random.default_rng(seed)
        return {group.name: random.random(group.size) for group in groups}
    weights, gradients = by_path(params), by_path(grads)

    def member_score(path: str, axis: int) -> np.ndarray:
        single = CRITERIA[criterion](weights[path], gradients[path])
        others = tuple(i for i in range(single.ndim) if i != axis)
        return np.asarray(single.sum(axis=others), np.float64)

    return {
        group.name: np.mean([member_score(m.path, m.axis) for m in group.members if m.votes], axis=0)
        for group in groups
    }


def disturbed_loss(
    embed: Callable[[Tree, Any], jax.Array], params: Tree, batch: Any, target: jax.Array, noise: jax.Array
):
    """MSE between a model's embedding and a target plus noise; its gradient in `params` is the disturbed one."""
    return jnp.mean(jnp.square(embed(params, batch) - jax.lax.stop_gradient(target) - noise))


def disturbed_gradients(
    embed: Callable[[Tree, Any], jax.Array],
    params: Tree,
    batches: Iterable[Any],
    key: jax.Array,
    std: float = 0.01,
    reduce: Literal["rms", "sum"] = "rms",
) -> Tree:
    """Gradients of the disturbed loss of a model against itself, reduced over batches.

    With target and model equal, the gradient is the noise pulled back through the Jacobian,
    -(2/N) Jᵀε: no second model is run, and `std` only scales it. It has mean zero, so the
    reference's sum over images is a random walk whose end is one draw. Squared, the cross
    terms of independent noise vanish, batches and the images within them alike: "rms" is an
    unbiased estimate of diag(Σ JᵀJ) before its root, and settles with fewer images.

    Args:
      embed: (params, batch) -> embeddings; compiled here, once per shape of batch.
      params: the model.
      batches: what `embed` takes.
      key: of the noise; each batch draws its own.
      std: of the noise (the paper's 0.01; only the scale depends on it).
      reduce: "rms" (root of the summed squares) or "sum" (the reference's).

    Returns:
      A tree like `params`; only its absolute values mean something.
    """

    @jax.jit
    def accumulate(total, params, batch, key):
        embedding, pull_back = jax.vjp(lambda p: embed(p, batch), params)
        noise = std * jax.random.normal(key, embedding.shape)
        (grads,) = pull_back(-2.0 / embedding.size * noise)
        return jax.tree.map(lambda t, g: t + (g**2 if reduce == "rms" else g), total, grads)

    params = jax.tree.map(jnp.asarray, params)
    # Placed as the parameters are: placed otherwise, the second call would compile again.
    total = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), params)
    for index, batch in enumerate(batches):
        total = accumulate(total, params, batch, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.sqrt, total) if reduce == "rms" else total
