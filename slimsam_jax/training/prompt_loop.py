"""Simulates interactive segmentation: corrective clicks sampled inside the jitted step.

The training algorithm of Segment Anything (Kirillov et al. 2023, appendix A): after a first prompt (`data.prompted`)
each round adds a click, drawn evenly from what is wrong, and gives the decoder its own logits back as a mask prompt.
Gradients flow through every decoding, and not through clicks and logits given back.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from slimsam_jax.distillation import mask_losses
from slimsam_jax.distillation.mask_losses import Groups, Weights
from slimsam_jax.imaging.prompts import ABSENT
from slimsam_jax.models.config import Config
from slimsam_jax.models.sam import Embedding, Params, decode, in_training

Outputs = Literal["sam", "both"]
OUTSIDE = -40.0  # a logit without any doubt, and so without loss and gradient
FEWEST = 10  # cells of disagreement below which EdgeSAM adds no click


class Prompts(NamedTuple):
    """Inputs of `sam.decode` for p prompts: points [p, n, 2], labels [p, n] and previous logits [p, 4h, 4w, 1]."""

    points: jax.Array
    labels: jax.Array
    masks: jax.Array | None = None


def interactive_loss(
    config: Config,
    params: Params,
    embedding: Embedding,
    batch: dict[str, jax.Array],
    weights: Weights,
    corrections: int = 1,
    outputs: Outputs = "both",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss, mean over b images of p prompts each, and over the first prompt and all corrections.

    Args:
      embedding: [b, h, w, C], or a dict of such maps.
      batch: from `MaskBatches`.
      weights: of the terms, see `mask_losses.prompt_loss`.
      outputs: which learn: see `learning`.

    Returns:
      The loss, and {term: unweighted} with "iou_0", "iou_1", ...: the mean IoU after each round.
    """
    count = batch["labels"].shape[1]
    spread = lambda rows: jnp.repeat(rows, count, axis=0)  # an image's for each of its prompts
    embedding, inside = jax.tree.map(spread, embedding), spread(inside_image(config, batch["size"]))
    keys = _flat(jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), count))(batch["seed"]))
    prompts, target = Prompts(_flat(batch["points"]), _flat(batch["labels"])), _flat(batch["masks"])
    rounds, ious = [], {}
    for turn in range(1 + corrections):
        logits, predicted = decode(in_training(config), params, embedding, *prompts)
        groups = learning(config, turn, outputs)
        seen = jnp.where(inside[:, None], logits, OUTSIDE)
        loss, terms, actual = mask_losses.prompt_loss(seen, predicted, target, weights, groups)
        rounds.append({"loss": loss, **terms})
        given = given_back(predicted, groups)
        ious[f"iou_{turn}"] = jnp.take_along_axis(actual, given[:, None], 1).mean()
        if turn < corrections:
            low = jax.lax.stop_gradient(jnp.take_along_axis(logits, given[:, None, None, None], 1)[:, 0])
            prompts = corrected(
                config, jax.vmap(jax.random.fold_in, (0, None))(keys, turn), prompts, low, target, inside
            )
    means = {name: sum(terms[name] for terms in rounds) / len(rounds) for name in rounds[0]}
    return means["loss"], {**means, **ious}


def corrected(
    config: Config, keys: jax.Array, prompts: Prompts, low: jax.Array, target: jax.Array, inside: jax.Array
) -> Prompts:
    """Adds to each prompt one click, and the logits [p, 4h, 4w] that it corrects."""
    cells, labels = jax.vmap(correction)(keys, low, target, inside)
    points = (cells + 0.5)[:, None] * config.patch_size / 4
    join = lambda old, new: jnp.concatenate([old, new], axis=1)
    return Prompts(join(prompts.points, points), join(prompts.labels, labels[:, None]), low[..., None])


def correction(key: jax.Array, logits: jax.Array, target: jax.Array, inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples a click from the cells that are wrong, all equally likely.

    Args:
      logits, target: [4h, 4w].
      inside: [4h, 4w] bool, where a click may be.

    Returns:
      [2] (x, y), whole cells, and its label: 1 where the mask misses something, 0 where it has too much, ABSENT where
      nothing is wrong.
    """
    return drawn(key, disagreement(logits > 0, target > 0.5, inside.astype(jnp.float32)))


def disagreement(student: jax.Array, target: jax.Array, valid: jax.Array, missed: bool = False) -> jax.Array:
    """Labels cells by the click that would correct them.

    Args:
      student, target: masks, bool [..., 4h, 4w].
      valid: share of each cell that is image (`valid_share`). A cell that is so in part can have too much, and cannot
        miss anything, as EdgeSAM has it.
      missed: only what the student misses, as TinySAM has it.

    Returns:
      int32 of that shape: 1 where the student misses something, 0 where it has too much, ABSENT elsewhere.
    """
    lacking, surplus = target & ~student & (valid == 1), student & ~target & (valid > 0)
    return jnp.where(lacking, 1, jnp.where(surplus & (not missed), 0, ABSENT)).astype(jnp.int32)


def drawn(key: jax.Array, labels: jax.Array, fewest: int = 1) -> tuple[jax.Array, jax.Array]:
    """Draws a click from the cells of `disagreement` [4h, 4w], all equally likely; see `correction`.

    Args:
      fewest: cells without which there is no click.
    """
    wrong = labels != ABSENT
    # The largest of equally distributed numbers is at any place with the same probability.
    place = jnp.where(wrong, jax.random.uniform(key, wrong.shape), -1.0).argmax()
    y, x = jnp.unravel_index(place, wrong.shape)
    return jnp.stack([x, y]).astype(jnp.float32), jnp.where(wrong.sum() >= fewest, labels[y, x], ABSENT)


def learning(config: Config, turn: int, outputs: Outputs) -> Groups:
    """Returns the groups of outputs that learn in a round (0 is that of the first prompt), see `prompt_loss`.

    "sam": the best of the several masks after the first prompt, the single mask after corrections (in the paper the
    single mask is for more than one prompt). "both": always both, because the single mask of a single click is what
    SlimSAM measures, and what `multimask_output=False` asks for.
    """
    single, several = [0], list(range(1, 1 + config.multimask_outputs))
    if outputs == "both":
        return [single, several] if several else [single]
    return [several] if turn == 0 and several else [single]


def given_back(predicted: jax.Array, groups: Groups) -> jax.Array:
    """Picks the outputs to correct, [p]: the single mask, or where it does not learn, the best by its own estimate."""
    first = jnp.array(groups[0])
    return first[predicted[:, first].argmax(1)]


def inside_image(config: Config, sizes: jax.Array) -> jax.Array:
    """Tells which cells lie in the image: [b, 2] sizes in the model frame -> [b, 4h, 4w] bool, as `coverage` has it."""
    cells = jnp.maximum(1, jnp.round(4 * sizes / config.patch_size))
    rows, columns = (jnp.arange(4 * side) for side in config.grid)
    return (rows[:, None] < cells[:, 0, None, None]) & (columns < cells[:, 1, None, None])


def valid_share(sizes: jax.Array, grid: tuple[int, int], stride: float) -> jax.Array:
    """Shrinks the part of a frame that is image to cells of `stride` pixels, by bilinear samples at their centres.

    Args:
      sizes: [b, 2] of the images in the model frame.

    Returns:
      [b, h, w] float32: 1 inside, 0 outside, 0.5 (0.25 in a corner) where the image ends within a sample.
    """
    # A centre lies between two pixels, of which it takes half each.
    ends = [stride * jnp.arange(side) + stride / 2 - 1 for side in grid]
    rows, columns = (jnp.clip(sizes[:, i, None] - ends[i], 0, 2) / 2 for i in range(2))
    return rows[:, :, None] * columns[:, None]


def _flat(rows: jax.Array) -> jax.Array:
    """Flattens [b, p, ...] to [b * p, ...]."""
    return rows.reshape(-1, *rows.shape[2:])
