"""Computes losses of predicted masks against the true ones. Logits and targets are [..., y, x], targets 0 to 1.

Focal and dice loss in the ratio 20 : 1 and the squared error of the predicted IoU are SAM's (Kirillov et al. 2023,
section 3 and appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Weights = dict[str, float]
Groups = Sequence[Sequence[int]]


def focal(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Computes the focal loss of each pixel, [..., y, x], with gamma 2 and alpha 0.25 as RetinaNet (Lin et al. 2017).

    What is right already counts little.
    """
    likely, unlikely = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -(0.25 * target * jnp.exp(2 * unlikely) * likely + 0.75 * (1 - target) * jnp.exp(2 * likely) * unlikely)


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Computes the binary cross entropy of each pixel, [..., y, x]."""
    return -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits))


def dice(logits: jax.Array, target: jax.Array, valid: jax.Array | float = 1.0) -> jax.Array:
    """Computes the dice loss of each mask, [...]: 0 if equal, 1 if nothing is shared (Milletari et al. 2016).

    Args:
      valid: how much each pixel counts, 0..1.
    """
    share, target = valid * jnp.exp(jax.nn.log_sigmoid(logits)), valid * target
    overlap, total = (share * target).sum((-2, -1)), (share + target).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def overlap(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Computes the IoU of each mask with what is more than half covered, [...]; empty ones agree (1). No gradient."""
    mask, truth = logits > 0, target > 0.5
    union = (mask | truth).sum((-2, -1))
    return jnp.where(union > 0, (mask & truth).sum((-2, -1)) / jnp.maximum(union, 1), 1.0)


PIXELS = {"focal": focal, "bce": cross_entropy}


def prompt_loss(
    logits: jax.Array, predicted: jax.Array, target: jax.Array, weights: Weights, groups: Groups
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Computes the loss of p prompts' outputs, mean over prompts and groups.

    Args:
      logits: [p, outputs, y, x].
      predicted: [p, outputs], the IoUs that the model predicts.
      target: [p, y, x].
      weights: of the terms, any of "focal", "bce", "dice" and "iou".
      groups: of outputs. Of each, the one with the lowest loss learns its mask (an ambiguous prompt means one of
        several objects), all learn their IoU.

    Returns:
      The loss, {term: unweighted}, and the true IoUs [p, outputs].
    """
    target = target[:, None]
    terms = {name: PIXELS[name](logits, target).mean((-2, -1)) for name in PIXELS if name in weights}
    if "dice" in weights:
        terms["dice"] = dice(logits, target)
    cost, actual = sum(weights[name] * term for name, term in terms.items()), overlap(logits, target)
    means = {name: jnp.zeros(()) for name in weights}
    for group in map(jnp.array, groups):
        best = group[cost[:, group].argmin(1)][:, None]
        for name, term in terms.items():
            means[name] += jnp.take_along_axis(term, best, 1).mean() / len(groups)
        if "iou" in weights:
            means["iou"] += jnp.square(predicted - actual)[:, group].mean() / len(groups)
    return sum(weights[name] * term for name, term in means.items()), means, actual


def valid_loss(
    logits: jax.Array, predicted: jax.Array, target: jax.Array, valid: jax.Array, learns: jax.Array, weights: Weights
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Computes the loss of p prompts' outputs by a target of each, where an image is: EdgeSAM's (its section 3.2).

    Its mean is over prompts, and of each over the outputs that learn. EdgeSAM's cross entropy takes the logarithm of
    probabilities, which float32 rounds to 0 and 1 beyond logits of 17, and then 100; ours goes on with the logits.

    Args:
      logits, target: [p, outputs, y, x].
      predicted: [p, outputs], the IoUs that the model predicts.
      valid: [p, y, x], the share of each cell that is image, 0..1.
      learns: [p, outputs], 1 where an output learns, at least one of each prompt.
      weights: of the terms, as of `prompt_loss`.

    Returns:
      As `prompt_loss`.
    """
    valid = valid[:, None]
    mean = lambda pixels: (valid * pixels).sum((-2, -1)) / valid.sum((-2, -1))
    terms = {name: mean(PIXELS[name](logits, target)) for name in PIXELS if name in weights}
    if "dice" in weights:
        terms["dice"] = dice(logits, target, valid)
    actual = overlap(jnp.where(valid > 0, logits, -1.0), jnp.where(valid > 0, target, 0.0))
    if "iou" in weights:
        terms["iou"] = jnp.square(predicted - actual)
    share = learns / learns.sum(1, keepdims=True)
    means = {name: (share * term).sum(1).mean() for name, term in terms.items()}
    return sum(weights[name] * term for name, term in means.items()), means, actual


def hardness(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Weighs masks by how much better the teacher's are: TinySAM's hard mask weight, [...] in 0.5 at par, to 1.

    Args:
      student, teacher: IoUs of their masks with the truth, [...].
    """
    return jax.nn.sigmoid(teacher / (student + 1e-3) - 1)
