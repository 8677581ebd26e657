"""Scores channels by parameters and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from slimsam_jax.pruning.groups import Group, Member, Scores, Tree, by_path

Criterion = Literal["taylor", "fisher", "magnitude", "random"]

# Importance of each single weight, from the weight and its gradient.
CRITERIA: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    # First order: how far the loss moves without the weight.
    "taylor": lambda weight, grad: np.abs(weight * grad),
    # Second order, ½ w² H: the Fisher information stands for the diagonal of the Hessian. With "rms" gradients of
    # the disturbed loss it is the diagonal of JᵀJ, which is that Hessian exactly where the residual is zero.
    "fisher": lambda weight, grad: np.square(weight * grad),
    "magnitude": lambda weight, grad: np.square(weight),
}
WITHOUT_GRADIENT = ("magnitude", "random")

# Makes the scores of different groups comparable before they compete (SlimSAM's importance.py:350-366).
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
    mean over its scored members.

    Args:
      params, grads: trees of equal structure, numpy or JAX arrays. "magnitude" and "random" do not read the gradients.
      groups: channels to score.
      criterion: a key of `CRITERIA` ("taylor" with the disturbed gradient is Disturbed Taylor), or "random".
      seed: for "random".

    Returns:
      {group name: [size], or [copies, size] of a group of copies, float64}.
    """
    if criterion == "random":
        random = np.random.default_rng(seed)
        return {group.name: random.random(group.shape) for group in groups}
    weights, gradients = by_path(params), by_path(grads)

    def member_score(member: Member) -> np.ndarray:
        single = CRITERIA[criterion](weights[member.path], gradients[member.path])
        kept = [member.axis] if member.copies is None else [member.copies, member.axis]
        score = single.sum(axis=tuple(i for i in range(single.ndim) if i not in kept), dtype=np.float64)
        return score if kept == sorted(kept) else score.T

    return {group.name: np.mean([member_score(m) for m in group.members if m.votes], axis=0) for group in groups}
