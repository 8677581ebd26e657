"""The step of a distillation: which features a student is compared by, with which targets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slimsam_jax import sharding
from slimsam_jax.compression.loss_terms import aligns
from slimsam_jax.compression.steps import Distill
from slimsam_jax.distillation import losses
from slimsam_jax.distillation.step import init_state, make_optimizer, make_step
from slimsam_jax.models.encoders import family_of
from slimsam_jax.models.encoders.layers import kernels, learning
from slimsam_jax.models.relative_attention import Form
from slimsam_jax.models.sam import Architecture, Embedding, Params, Sam, decode, folded, in_training, run_encoder
from slimsam_jax.quantization import any_quantized, training
from slimsam_jax.quantization.running import quantizes_inputs
from slimsam_jax.quantization.running import run as run_quantized
from slimsam_jax.training.loop import Trainer
from slimsam_jax.training.prompt_loop import valid_share

Batch = dict[str, Any]
Encode = Callable[[Architecture, Any, Batch], tuple[Embedding, Any]]


def make_trainer(
    student: Sam,
    previous: Sam,
    teacher: Sam,
    step: Distill,
    dtype: Any = jnp.float32,
    parts: int = 1,
    fsdp: int = 1,
    attention: Form = "auto",
    known: bool = False,
) -> Trainer:
    """Places the models of a distillation on the devices and builds its step; of models of shapes places shapes.

    Of a student of integers these lie beside the frozen parameters, and what learns is `quantization.training`'s.

    Args:
      previous: the model that was pruned; before any cut the teacher itself.
      dtype: of the encoders' computation and of the frozen ones' parameters; the student's own, prompt encoder and
        mask decoder stay float32.
      parts: that each batch is taken in, see `distillation.step.make_step`.
      fsdp: devices that parameters are split over, see `sharding`.
      attention: how it is computed, see `models.relative_attention`.
      known: whether batches bring their targets, see `targets`.
    """
    mesh = sharding.make_mesh(fsdp)
    optimizer = make_optimizer(step.optimizer.clip, step.optimizer.weight_decay, kernels)
    encode = functools.partial(run_encoder, dtype=dtype, mesh=mesh, attention=attention)
    own = functools.partial(encode, attention=attention_of(student, attention))
    train_step = make_step(
        functools.partial(_student_features, own, student.config, step),
        functools.partial(_target_features, encode, previous.config, teacher.config, step),
        optimizer,
        step.losses.relative,
        parts,
        step.optimizer.reduction,
        step.optimizer.ema,
        mesh,
    )
    frozen = {} if known else {"teacher": teacher.params["image_encoder"]}
    if previous is not teacher and aligns(step) and not known:
        frozen["previous"] = previous.params["image_encoder"]
    frozen = sharding.cast(frozen, dtype)
    if step.losses.masks:
        frozen["head"] = {name: teacher.params[name] for name in ("prompt_encoder", "mask_decoder")}
    frozen |= integers_of(student, step.train)
    learnable = {part: training.learnable(student.params[part]) for part in step.train}
    state = init_state(learnable, optimizer, step.optimizer.ema)
    return Trainer(train_step, sharding.place(state, mesh), sharding.place(frozen, mesh), mesh)


def integers_of(student: Sam, parts: tuple[str, ...]) -> dict[str, Any]:
    """What a student's parts have of integers, as frozen parameters, {"integers": {part: {path: node}}}; {} of none."""
    if not any(any_quantized(student.params[part]) for part in parts):
        return {}
    nodes = {part: training.nodes_of(student.params[part]) for part in parts}
    return {"integers": {part: {path: training.in_floats(n) for path, n in own.items()} for part, own in nodes.items()}}


def attention_of(student: Sam, attention: Form) -> Form:
    """The form for a student: flash attention has no gradient where a program is run equation by equation."""
    equations = quantizes_inputs(student.params["image_encoder"])
    return "rows" if equations and sharding.platform() != "cpu" and attention != "plain" else attention


def _student_features(
    encode: Encode, config: Architecture, step: Distill, params: Any, frozen: Any, batch: Batch
) -> losses.Features:
    if integers := frozen.get("integers"):
        params = {part: training.joined(own, integers[part]) for part, own in params.items()}
    seen = {name: batch[name] for name in ("image", "size") if name in batch}  # a program is traced for all it is given
    computed, encoder = without_norms(config, params["image_encoder"])
    embedding, features = run_quantized(functools.partial(encode, computed), encoder, seen)
    head = {**frozen.get("head", {}), **params}
    found = {"embedding": embedding, **_views(config, step, embedding, head, batch)}
    return _counting(step, config, found | _aligned(step, config, features, embedding), batch)


def without_norms(config: Architecture, encoder: Params) -> tuple[Architecture, Params]:
    """The same encoder with batch norms multiplied into convolutions, as its statistics stay: what learns is the same.

    To train it so takes fewer passes over activations, and keeps fewer of them. No gradient reaches the statistics.
    """
    if not getattr(config.encoder, "batch_norm", False) or any_quantized(encoder):
        return config, encoder
    hold = lambda leaf, learns: leaf if learns else jax.lax.stop_gradient(leaf)
    sam = folded(Sam(config, {"image_encoder": jax.tree.map(hold, encoder, learning(encoder))}))
    return sam.config, sam.encoder


def _target_features(
    encode: Encode, previous: Architecture, teacher: Architecture, step: Distill, frozen: Any, batch: Batch
) -> losses.Features:
    """`frozen_features`, or those that come with the batch (see `targets`): [b, 1, ...], then; and views of them."""
    if "targets" in batch:
        found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch["targets"])
    else:
        found = frozen_features(encode, previous, teacher, step, frozen, batch)
    found = found | _views(teacher, step, found["embedding"], frozen.get("head"), batch)
    return _counting(step, teacher, found, batch)


def _counting(step: Distill, config: Architecture, found: losses.Features, batch: Batch) -> losses.Features:
    """Leaves out of the embedding's term what `Losses.padding` leaves out."""
    if step.losses.padding:
        return found
    return {**found, "embedding": within_image(found["embedding"], batch["size"], config.patch_size)}


def within_image(embedding: jax.Array, sizes: jax.Array, stride: int) -> jax.Array:
    """Scales embeddings [b, h, w, C] so that their squared error is EdgeSAM's, without padding.

    Its sum over the valid cells of each image is divided by each image's number of them, and the mean taken over all
    pairs: so all cells of a batch count alike.

    Args:
      sizes: [b, 2] of the images in the model frame.
      stride: pixels to a cell.
    """
    valid = valid_share(sizes, embedding.shape[1:3], stride) > 0.5
    counts = jnp.maximum(valid.sum((1, 2)), 1)
    scale = jnp.sqrt(valid[0].size * (1 / counts).mean())
    return embedding * (valid * scale)[..., None]


def frozen_features(
    encode: Encode, previous: Architecture, teacher: Architecture, step: Distill, frozen: Any, batch: Batch
) -> losses.Features:
    """The teacher's embedding, and features of the model before the cut, which may be the teacher.

    A teacher's embedding that comes with the batch (see `teacher_cache`) is not computed again.
    """
    before = None
    if "teacher" in frozen:
        before, features = encode(teacher, frozen["teacher"], batch)
    embedding = batch.get("embedding", before)
    if "previous" in frozen:
        before, features = encode(previous, frozen["previous"], batch)
    return {"embedding": embedding, **_aligned(step, previous, features, before)}


def _aligned(step: Distill, config: Architecture, features: Any, embedding: Embedding) -> losses.Features:
    """What a step can compare with the model before the cut: features by their family's names, and its embedding."""
    own = family_of(config.encoder).features(config.encoder, features)
    return own["embedding"] if step.align == "bottleneck" else {"previous": embedding, **own["bottleneck"]}


def _views(config: Architecture, step: Distill, embedding: Embedding, head: Any, batch: Batch) -> losses.Features:
    """The embedding as others see it; see `Losses`."""
    found, embedding = {}, jax.tree.map(lambda x: x.astype(jnp.float32), embedding)
    if step.losses.direction:
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        found["direction"] = jax.tree.map(unit, embedding)
    if step.losses.masks:
        found["masks"], found["iou"] = masks_at_clicks(config, head, embedding, batch)
    return found


def masks_at_clicks(
    config: Architecture, head: Params, embedding: Embedding, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """What the decoder makes of a batch's clicks.

    Args:
      head: {"prompt_encoder": ..., "mask_decoder": ...}.
      embedding: [b, h, w, C], or a dict of such maps.
      batch: with "points" [b, p, n, 2] and "labels" [b, p, n].

    Returns:
      Mask probabilities [b * p, 1 + multimask_outputs, 4h, 4w] and predicted IoU [b * p, 1 + multimask_outputs],
      float32 0..1.
    """
    points, labels = batch["points"], batch["labels"]
    each = jax.tree.map(lambda x: jnp.repeat(x, points.shape[1], axis=0), embedding)
    flat = lambda array: array.reshape(-1, *array.shape[2:])
    logits, iou = decode(in_training(config), head, each, flat(points), flat(labels))
    return jax.nn.sigmoid(logits), iou
