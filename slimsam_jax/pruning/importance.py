"""Scores channels by parameters and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.groups import Group, Member, Scores, Tree, by_path

Arrays = Mapping[str, np.ndarray]
Criterion = Literal["taylor", "fisher", "obd", "magnitude", "l1", "l2", "fpgm", "random"]
Reduction = Literal["mean", "sum", "max", "prod", "first"]
Normalizer = Literal["none", "sum", "mean", "max", "minmax", "gaussian", "lamp"]

# Importance of each single weight, from the weight and its gradient; a channel's is the sum over its weights.
CRITERIA: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    # First order: how far the loss moves without the weight.
    "taylor": lambda weight, grad: np.abs(weight * grad),
    # Second order, ½ w² H: the Fisher information stands for the diagonal of the Hessian. With "rms" gradients of
    # the disturbed loss it is the diagonal of JᵀJ, which is that Hessian exactly where the residual is zero. Up to
    # the scale Torch-Pruning's GroupHessianImportance, and EigenDamage's C-OBD (Wang et al., ICML 2019), for which its
    # OBDCImportance counts what makes a channel alone and not what reads it.
    "fisher": lambda weight, grad: np.square(weight * grad),
    # The same with a diagonal that was estimated (`gradients.hessian_diagonal`) in the place of the gradient: LeCun et
    # al., Optimal Brain Damage, 1990. Where the loss bends down the expansion says nothing about a whole weight.
    "obd": lambda weight, curvature: np.square(weight) * np.maximum(curvature, 0) / 2,
    # The squared L2 norm (GroupMagnitudeImportance with p=2), and the L1 norm (p=1; Li et al., ICLR 2017). Of the
    # scales of BatchNorms alone (`votes`) that is network slimming: Liu et al., ICCV 2017, BNScaleImportance.
    "magnitude": lambda weight, grad: np.square(weight),
    "l1": lambda weight, grad: np.abs(weight),
}

# Importance of whole channels of one array, from weights and gradients [..., size, weights of a channel]: [..., size].
OF_CHANNELS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "l2": lambda weights, grads: np.linalg.norm(weights, axis=-1),
    # How far a channel is from all others: one near their geometric median can be made up for by them (He et al., CVPR
    # 2019). As in the paper, of the weights themselves; FPGMImportance raises their absolute values to the power p.
    "fpgm": lambda weights, grads: _distances(weights),
}
CHOICES = (*CRITERIA, *OF_CHANNELS, "random")
WITHOUT_GRADIENT = ("magnitude", "l1", "l2", "fpgm", "random")

# The scores of a group from those of its members, [members, ...]; "first" is the array that makes the channels.
REDUCTIONS: dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]] = {
    "mean": lambda scores: np.mean(scores, axis=0),
    "sum": lambda scores: np.sum(scores, axis=0),
    "max": lambda scores: np.max(scores, axis=0),
    "prod": lambda scores: np.prod(scores, axis=0),
    "first": lambda scores: scores[0],
}

# Makes the scores of different groups comparable before they compete (SlimSAM's importance.py:350-366).
NORMALIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda s: s,
    "sum": lambda s: s / s.sum(),
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "minmax": lambda s: (s - s.min()) / (s.max() - s.min() + 1e-8),
    "gaussian": lambda s: (s - s.mean()) / (s.std(ddof=1) + 1e-8),
    # A score as a share of all that are not smaller: Lee et al., ICLR 2021 (with "magnitude"), LAMPImportance.
    "lamp": lambda s: s / _sum_of_the_greater(s),
}


def channel_scores(
    params: Tree,
    grads: Tree,
    groups: Sequence[Group],
    criterion: Criterion = "taylor",
    seed: int = 0,
    reduction: Reduction = "mean",
) -> Scores:
    """Scores every channel of every group.

    An array's score of a channel sums the weights in the channel's slice, or is taken of the
    slice as a whole; a group's is the reduction over its scored arrays.

    Args:
      params, grads: trees of equal structure, numpy or JAX arrays. Those in `WITHOUT_GRADIENT` do not read the latter.
      groups: channels to score.
      criterion: a key of `CRITERIA` ("taylor" with the disturbed gradient is Disturbed Taylor) or `OF_CHANNELS`, or
        "random".
      seed: for "random".
      reduction: a key of `REDUCTIONS`.

    Returns:
      {group name: [size], or [copies, size] of a group of copies, float64}.
    """
    check_choice("criterion", criterion, CHOICES)
    check_choice("reduction", reduction, REDUCTIONS)
    if criterion == "random":
        random = np.random.default_rng(seed)
        return {group.name: random.random(group.shape) for group in groups}
    weights, gradients = by_path(params), by_path(grads)
    of_array = _sum_over_weights if criterion in CRITERIA else _of_slices
    score = lambda pieces: of_array(criterion, pieces, weights, gradients)
    return {group.name: REDUCTIONS[reduction](list(map(score, _scored(group)))) for group in groups}


def _scored(group: Group) -> list[list[Member]]:
    """The members that vote; those that are pieces of one array along one axis make one score together."""
    arrays: dict[tuple[str, int], list[Member]] = {}
    for member in group.members:
        if member.votes:
            arrays.setdefault((member.whole or member.path, member.axis), []).append(member)
    return list(arrays.values())


def check_choice(what: str, chosen: str, allowed) -> None:
    if chosen not in allowed:
        raise InputError(f"{what} {chosen!r} is none of {', '.join(allowed)}")


def _sum_over_weights(criterion: str, pieces: Sequence[Member], weights: Arrays, grads: Arrays) -> np.ndarray:
    def of_piece(member: Member) -> np.ndarray:
        single = CRITERIA[criterion](_no_half(weights[member.path]), _no_half(grads[member.path]))
        kept = [member.axis] if member.copies is None else [member.copies, member.axis]
        score = single.sum(axis=tuple(i for i in range(single.ndim) if i not in kept), dtype=np.float64)
        return score if kept == sorted(kept) else score.T

    return sum(map(of_piece, pieces[1:]), of_piece(pieces[0]))


def _no_half(array: Any) -> np.ndarray:
    """At least float32: squares of half precision vanish."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _of_slices(criterion: str, pieces: Sequence[Member], weights: Arrays, grads: Arrays) -> np.ndarray:
    def rows(array: np.ndarray, member: Member) -> np.ndarray:
        kept = [member.axis] if member.copies is None else [member.copies, member.axis]
        array = np.moveaxis(np.asarray(array, np.float64), kept, range(len(kept)))
        return array.reshape(*array.shape[: len(kept)], -1)

    whole = lambda arrays: np.concatenate([rows(arrays[member.path], member) for member in pieces], axis=-1)
    return OF_CHANNELS[criterion](whole(weights), whole(grads))


def _distances(weights: np.ndarray, at_once: int = 1024) -> np.ndarray:
    """Sums the Euclidean distances of each channel to all others: [..., size, weights] -> [..., size]."""
    squares = np.square(weights).sum(-1)
    sums = []
    for start in range(0, weights.shape[-2], at_once):  # all pairs of a wide layer would not fit
        some = slice(start, start + at_once)
        products = weights[..., some, :] @ np.swapaxes(weights, -1, -2)
        between = squares[..., some, None] + squares[..., None, :] - 2 * products
        sums.append(np.sqrt(np.maximum(between, 0)).sum(-1))
    return np.concatenate(sums, -1)


def _sum_of_the_greater(scores: np.ndarray) -> np.ndarray:
    """For each score the sum of all that are not smaller, itself included."""
    ascending = np.sort(scores, axis=None)
    sums = np.cumsum(ascending[::-1])[::-1]
    return sums[np.searchsorted(ascending, scores)]
