"""The loss of `DistillMasks`: each prompt decoded by student and teacher, corrected by a click, and decoded again.

One program for all numbers of clicks: prompts have room for all of them, and what is not there yet is passed by.
Shapes: b images of p prompts each, q = b * p; m outputs of the decoder, [4h, 4w] each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slimsam_jax.compression.mask_steps import DistillMasks
from slimsam_jax.distillation import mask_losses
from slimsam_jax.distillation.losses import absolute_error
from slimsam_jax.imaging.prompts import ABSENT, BOX_TOP_LEFT
from slimsam_jax.models.sam import Architecture, Params, decode_tokens
from slimsam_jax.training import prompt_loop
from slimsam_jax.training.prompt_loop import FEWEST, OUTSIDE

Batch = dict[str, Any]
Terms = dict[str, jax.Array]
BY_DECODINGS = ("tokens", "outputs")  # terms that compare student and teacher decoding by decoding
KEPT = 2  # rounds up to which a decoding's activations are kept for the backward pass; beyond it is computed again
TEACHERS = "teacher"  # decodings, which are kept: a mask weighs little beside what made it


class Side(NamedTuple):
    """A model with the embeddings [b, h, w, C] that it gave; `params` at least of prompt encoder and decoder."""

    config: Architecture
    params: Params
    embedding: jax.Array


class Decoded(NamedTuple):
    """Logits [q, m, 4h, 4w], predicted IoU [q, m] and output tokens [q, 1 + m, C]."""

    logits: jax.Array
    iou: jax.Array
    tokens: jax.Array


def prompted_loss(
    step: DistillMasks, student: Side, teacher: Side | None, batch: Batch, weights: dict[str, float]
) -> tuple[jax.Array, Terms]:
    """Computes the loss, mean over prompts and rounds.

    Args:
      teacher: None where `step.reads_teacher` is false.
      batch: from `MaskBatches`: "size", "points", "labels", "masks" and "seed".
      weights: of the terms (`MaskLosses.weights`), which must all be of `step`.

    Returns:
      The loss, and {term: unweighted} with "overlap", the mean IoU of the masks that were corrected with their targets.
    """
    prompting, count = step.prompting, batch["labels"].shape[1]
    spread = lambda side: side and side._replace(embedding=jnp.repeat(side.embedding, count, axis=0))
    ours, theirs, scene = spread(student), spread(teacher), scene_of(student.config, batch)
    room = ((0, 0), (0, max(0, prompting.rounds - 1)))
    points = jnp.pad(_flat(batch["points"]), (*room, (0, 0)))
    labels = jnp.pad(_flat(batch["labels"]), room, constant_values=ABSENT)
    rounds = 1 + batch["seed"][0] % prompting.rounds if prompting.vary else prompting.rounds

    def turn(prompts, index):
        current = Decoded(*decode_tokens(ours.config, ours.params, ours.embedding, *prompts))
        target = None
        if theirs is not None:
            target = Decoded(*decode_tokens(theirs.config, theirs.params, theirs.embedding, *prompts))
            target = checkpoint_name(target, TEACHERS)
        terms, mask, truth = compared(step, ours.config, scene, prompts[1], current, jax.lax.stop_gradient(target))
        return clicked(step, ours.config, scene, prompts, index, mask, truth), terms

    def turn_if_due(prompts, index):
        nothing = lambda prompts, index: (prompts, dict.fromkeys(names, jnp.zeros(())))
        return jax.lax.cond(index < rounds, turn, nothing, prompts, index)

    names = sorted({*weights} - {"embedding"} | {"overlap"})  # of the same order in every process
    body = turn_if_due if prompting.vary else turn
    if prompting.rounds > KEPT:
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(TEACHERS))
    _, terms = jax.lax.scan(body, (points, labels), jnp.arange(prompting.rounds))
    means = {name: terms[name].sum() / rounds for name in names}
    if "embedding" in weights:
        means["embedding"] = absolute_error(student.embedding, teacher.embedding)
    return sum(weights[name] * means[name] for name in weights), means


class Scene(NamedTuple):
    """What stays through all rounds: `keys` [q], annotated `masks` and `valid` shares [q, 4h, 4w], `boxed` [q] bool."""

    keys: jax.Array
    masks: jax.Array
    valid: jax.Array
    boxed: jax.Array


def scene_of(config: Architecture, batch: Batch) -> Scene:
    """The scene of a batch from `MaskBatches`."""
    count = batch["labels"].shape[1]
    keys = _flat(jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), count))(batch["seed"]))
    cells = tuple(4 * side for side in config.grid)
    valid = jnp.repeat(prompt_loop.valid_share(batch["size"], cells, config.patch_size / 4), count, axis=0)
    return Scene(keys, _flat(batch["masks"]), valid, _flat(batch["labels"])[:, 0] == BOX_TOP_LEFT)


def compared(
    step: DistillMasks, config: Architecture, scene: Scene, labels: jax.Array, ours: Decoded, theirs: Decoded | None
) -> tuple[Terms, jax.Array, jax.Array]:
    """The terms of one round, and which mask is corrected by which: bool [q, 4h, 4w] each."""
    weights = {name: w for name, w in step.losses.weights().items() if name not in (*BY_DECODINGS, "embedding")}
    if step.prompting.target == "teacher":
        learns = taught(scene.boxed, ours.iou.shape[1])
        target = (theirs.logits > 0).astype(jnp.float32)
        _, terms, _ = mask_losses.valid_loss(ours.logits, ours.iou, target, scene.valid, learns, weights)
        best = chosen(theirs.iou, learns)
        mask, truth = (_take(side.logits, best) > 0 for side in (ours, theirs))
    else:
        terms = {}
        seen = jnp.where(scene.valid[:, None] > 0, ours.logits, OUTSIDE)
        groups = prompt_loop.learning(config, 0, "both")
        if weights:
            _, terms, _ = mask_losses.prompt_loss(seen, ours.iou, scene.masks, weights, groups)
        mask, truth = ours.logits[:, 0] > 0, scene.masks > 0.5
    within = scene.valid > 0
    terms = {**terms, "overlap": mask_losses.overlap(jnp.where(mask & within, 1.0, -1.0), truth & within).mean()}
    return terms | _by_decodings(step, scene, ours, theirs), mask, truth


def _by_decodings(step: DistillMasks, scene: Scene, ours: Decoded, theirs: Decoded | None) -> Terms:
    """TinySAM's comparisons of what both decoders give for the same prompt."""
    terms, valid = {}, scene.valid[:, None]
    if step.losses.tokens:
        terms["tokens"] = absolute_error(ours.tokens, theirs.tokens)
    if step.losses.outputs:
        weight: jax.Array | float = 1.0
        if step.losses.hard:
            inside = lambda logits: jnp.where(valid > 0, logits, OUTSIDE)
            ious = (mask_losses.overlap(inside(side.logits), scene.masks[:, None]) for side in (ours, theirs))
            weight = jax.lax.stop_gradient(mask_losses.hardness(*ious)[..., None, None])
        terms["outputs"] = absolute_error(ours.logits, theirs.logits, weight, valid)
    return terms


def taught(boxed: jax.Array, outputs: int) -> jax.Array:
    """Which outputs learn from the teacher's, [q, m]: for a box the single mask, for a click all."""
    first = jnp.arange(outputs) == 0
    return jnp.where(boxed[:, None], first, True).astype(jnp.float32)


def chosen(iou: jax.Array, learns: jax.Array) -> jax.Array:
    """The output that is corrected, [q]: of those that learn the best by the teacher's own estimate, [q, m]."""
    return jnp.where(learns > 0, iou, -jnp.inf).argmax(1)


def clicked(
    step: DistillMasks,
    config: Architecture,
    scene: Scene,
    prompts: tuple[jax.Array, jax.Array],
    index: jax.Array,
    mask: jax.Array,
    truth: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Puts a click into the room that prompts have for that of round `index`; after the last it is read by nobody."""
    missed = step.prompting.click == "missed"
    labels = prompt_loop.disagreement(mask, truth, scene.valid, missed)
    keys = jax.vmap(jax.random.fold_in, (0, None))(scene.keys, index)
    cells, kinds = jax.vmap(lambda key, each: prompt_loop.drawn(key, each, 1 if missed else FEWEST))(keys, labels)
    points, place = (cells + 0.5)[:, None] * (config.patch_size / 4), 2 + index
    put = jax.lax.dynamic_update_slice_in_dim
    return put(prompts[0], points, place, 1), put(prompts[1], kinds[:, None], place, 1)


def _take(logits: jax.Array, index: jax.Array) -> jax.Array:
    """[q, m, y, x] and [q] -> [q, y, x]."""
    return jnp.take_along_axis(logits, index[:, None, None, None], 1)[:, 0]


def _flat(rows: jax.Array) -> jax.Array:
    """[b, p, ...] -> [b * p, ...]."""
    return rows.reshape(-1, *rows.shape[2:])
