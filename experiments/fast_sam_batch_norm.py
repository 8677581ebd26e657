"""What new statistics of batch norms are good for in a FastSAM that has learned something: trained here, then cut.

    python -m experiments.fast_sam_batch_norm --seeds 0 1 2

A FastSAM of an eighth of the published widths learns to find plain shapes (`fast_sam_shapes`), batch norms by the
statistics of its batches as published ones have learned. Then it is cut by half and nothing is distilled: with the
statistics that it had, and with those of images it has learned from, as `distill.batch_norm=recalibrated` begins.

The error is that against the uncut model, of the four outputs, relative to their variance, mean over terms and unseen
images. IoU is of an unseen shape with the best of the masks that are detected, 0 where there is none.

There is no training of FastSAMs in the package. This one is as plain as can be: a cell near the middle of a shape
learns its box (distribution focal loss), that it is there (cross entropy), and its mask within the box (cross entropy).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.fast_sam_shapes import SIDE, Batch, Scene, batch_of, draw
from slimsam_jax import checkpoint
from slimsam_jax.compression.fast_sam import prune
from slimsam_jax.compression.fast_sam_distill import TERMS, outputs_of
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.encoders.layers import recalibrate, with_statistics
from slimsam_jax.models.fast_sam import Config, FastSam, Network, Outputs, init, scaled

RATE, PRIOR = 5e-3, -4.0  # the peak learning rate; logit of a cell's score at first, as most cells have nothing
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train, cut and measure.

    Attributes:
      steps: of 8 images.
      counts: images that new statistics are estimated from.
      limit: unseen images to measure on.
      out: folder to keep the uncut models in.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    ratio: float = 0.5
    criteria: tuple[str, ...] = ("magnitude", "taylor")
    counts: tuple[int, ...] = (8, 64)
    limit: int = 48
    out: Path | None = None


def main(options: Options) -> None:
    for seed in options.seeds:
        model = trained(options.steps, seed)
        if options.out:
            checkpoint.save(model, options.out / f"seed_{seed}")
        unseen = [draw(np.random.default_rng([seed, 1, i])) for i in range(options.limit)]
        report(f"seed {seed}, uncut", model, model, unseen)
        for criterion in options.criteria:
            images = [scene.image for scene in seen(seed, 24)]
            slim = prune(model, options.ratio, criterion, images if criterion == "taylor" else (), seed=seed)
            name = f"seed {seed}, {criterion}, cut by {options.ratio:g}"
            report(f"{name}, statistics as they were", slim, model, unseen)
            for count in options.counts:
                report(f"{name}, of {count} images", again(slim, seen(seed, count)), model, unseen)


def seen(seed: int, count: int) -> list[Scene]:
    return [draw(np.random.default_rng([seed, 0, i])) for i in range(count)]


def report(name: str, model: FastSam, uncut: FastSam, scenes: Sequence[Scene]) -> None:
    overlap, masks = found(model, scenes)
    print(f"{name}: error {error(model, uncut, scenes):.3f}, IoU {overlap:.3f}, masks an image {masks:.2f}", flush=True)


def error(model: FastSam, uncut: FastSam, scenes: Sequence[Scene]) -> float:
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    errors = []
    for scene in scenes:
        ours, wanted = (outputs_of(each.config, each.params, scene.image[None]) for each in (model, uncut))
        errors += [relative_error(flat(ours[term]), flat(wanted[term])) for term in TERMS]
    return float(np.mean(errors))


def found(model: FastSam, scenes: Sequence[Scene]) -> tuple[float, float]:
    """Mean best IoU of the shapes, and masks an image."""
    from PIL import Image

    best, counts = [], []
    for scene in scenes:
        masks = list(encode_image(model, Image.fromarray(scene.image)).masks)
        best += [max((float(iou(mask, truth)) for mask in masks), default=0.0) for truth in scene.masks]
        counts.append(len(masks))
    return float(np.mean(best)), float(np.mean(counts))


def again(slim: FastSam, scenes: Sequence[Scene]) -> FastSam:
    """With batch norms whose statistics are of these images."""
    pixels = np.stack([scene.image for scene in scenes]).astype(np.float32) / 255
    batches = (pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH))
    return dataclasses.replace(slim, params=recalibrate(Network(slim.config), slim.params, batches))


def trained(steps: int, seed: int) -> FastSam:
    config = scaled(0.33, 0.125, 1024, SIDE)
    params = init(config, jax.random.key(seed))
    for level in range(3):
        params[f"scores_{level}"]["out"]["bias"] += PRIOR
    rates = optax.warmup_cosine_decay_schedule(0.0, RATE, min(50, steps // 4), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rates))
    step, state = stepper(config, optimizer), optimizer.init(params)
    for number, batch in zip(range(1, steps + 1), batches(seed), strict=False):
        params, state, terms = step(params, state, batch)
        if number % 50 == 0 or number == steps:
            print(f"seed {seed}, step {number}: " + ", ".join(f"{k} {v:.3f}" for k, v in terms.items()), flush=True)
    return FastSam(config, params)


def batches(seed: int) -> Iterator[Batch]:
    number = 0
    while True:
        yield batch_of([draw(np.random.default_rng([seed, 0, number + i])) for i in range(BATCH)])
        number += BATCH


def stepper(config: Config, optimizer: optax.GradientTransformation) -> Any:
    """(params, state, batch) -> the same after a step, and the terms of the loss."""

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        pixels = batch.images.astype(jnp.float32) / 255
        network = Network(config, of_batch=True)
        (outputs, _), sown = network.apply({"params": params}, pixels, mutable=["statistics"])
        terms = jax.tree.map(jnp.mean, jax.vmap(terms_of)(outputs, batch))
        return sum(terms.values()), (terms, sown["statistics"])

    @jax.jit
    def step(params: Any, state: Any, batch: Batch):
        gradients, (terms, statistics) = jax.grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradients, state)
        return with_statistics(optax.apply_updates(params, updates), statistics), state, terms

    return step


def terms_of(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Of one image."""
    rows = lambda levels: jnp.concatenate([level.reshape(-1, level.shape[-1]) for level in levels])
    boxes, scores, coefficients = map(rows, outputs[:3])
    real = batch.real.astype(jnp.float32)
    mean = lambda values: (values * real).sum() / jnp.maximum(real.sum(), 1)
    there = jnp.zeros(len(scores)).at[batch.cells].max(real)
    score = optax.sigmoid_binary_cross_entropy(scores[:, 0], there).sum() / jnp.maximum(real.sum(), 1)
    logits = jnp.einsum("pm,hwm->phw", coefficients[batch.cells], outputs.prototypes)
    own = optax.sigmoid_binary_cross_entropy(logits, batch.masks[batch.objects]) * batch.windows[batch.objects]
    area = batch.windows.sum((1, 2))[batch.objects]
    shares = jax.nn.log_softmax(boxes[batch.cells].reshape(len(batch.cells), 4, -1))
    return {
        "score": score,
        "box": mean(focal(shares, batch.distances)),
        "mask": 4 * mean(own.sum((1, 2)) / jnp.maximum(area, 1)),
    }


@functools.partial(jax.vmap)
def focal(shares: jax.Array, distances: jax.Array) -> jax.Array:
    """Cross entropy with the two bins around each distance: [4, bins] logarithms and [4] in cells -> a mean."""
    low = jnp.floor(distances).astype(int)
    part = distances - low
    pick = lambda bins: jnp.take_along_axis(shares, bins[:, None], axis=1)[:, 0]
    return -((1 - part) * pick(low) + part * pick(low + 1)).mean()


if __name__ == "__main__":
    main(tyro.cli(Options))
