"""Gradients of a SAM that its importance is estimated from: disturbed, or of the loss of annotated masks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression.calibration_images import Calibration
from slimsam_jax.compression.steps import Prune
from slimsam_jax.distillation import mask_losses
from slimsam_jax.errors import RunError
from slimsam_jax.models.sam import Sam, decode, embedding_of, in_training, run_encoder
from slimsam_jax.pruning.gradients import disturbed, image_keys, loss_gradients, reduce_gradients


def mask_loss(sam: Sam, encoder: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """SAM's loss, 20 focal + dice (Kirillov et al., section 3), of the single mask for one click each.

    Args:
      sam: architecture, prompt encoder and mask decoder.
      encoder: the image encoder's parameters.
      batch: one image, from `AnnotatedBatches`.
    """
    embedding, _ = run_encoder(sam.config, encoder, batch)
    logits, _ = decode(
        in_training(sam.config), sam.params, embedding_of(embedding, 0), batch["points"][0], batch["labels"][0]
    )
    logits, target = logits[:, 0], batch["masks"][0]
    return 20 * mask_losses.focal(logits, target).mean() + mask_losses.dice(logits, target).mean()


def check_finite(found: Any) -> Any:
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
        raise RunError("the statistics of the model are not finite; does it give finite embeddings for these images?")
    return found


def gradients(sam: Sam, step: Prune, calibration: Calibration, seed: int) -> Any:
    """What the criterion reads besides the parameters; nothing but the parameters themselves if it reads none."""
    if not step.reads_gradients:
        return sam.params["image_encoder"]
    mesh, batches = sharding.make_mesh(), calibration("importance")
    encoder = sharding.replicate(sam.params["image_encoder"], mesh)
    if step.needs_labels:
        loss = functools.partial(mask_loss, sam)
        return check_finite(loss_gradients(loss, encoder, batches, step.grad_reduction, mesh))
    key = jax.random.key(seed)
    of_image = disturbed(
        lambda params, batch: run_encoder(sam.config, params, batch)[0], noise_samples=step.noise_samples
    )

    def of_seed(params: Any, item: Any, by_place: jax.Array) -> Any:
        # By the image's own seed: its place among all depends on how many processes and devices there are.
        return of_image(params, item, image_keys(key, item["seed"])[0] if "seed" in item else by_place)

    return check_finite(reduce_gradients(of_seed, encoder, batches, key, step.grad_reduction, mesh))
