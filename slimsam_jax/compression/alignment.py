"""The weight of each term of a distillation's loss, over the course of it (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

from slimsam_jax.compression.steps import Distill
from slimsam_jax.distillation.losses import Weights

EPOCHS = 20  # the schedules below are written in the reference's 20 epochs, whatever the number of steps


def bottleneck(progress: float, step: Distill) -> Weights:
    """First half: embedding and bottleneck features by halves; second half: the embedding alone."""
    a = 0.5 * step.losses.features * (progress < 0.5)
    return {
        "embedding": 1 - a,
        "qkv_window": a,
        "qkv_global": a * (not step.quirks.self_aligned_global),
        "mlp": a,
    }


def stream(progress: float, step: Distill) -> Weights:
    """From the residual stream of the model before the cut over to the teacher's embedding."""
    a = step.losses.features * _falling(progress)
    return {"embedding": 1 - a, "stream": a}


def stream_and_embedding(progress: float, step: Distill) -> Weights:
    """From residual stream and embedding of the model before the cut over to the teacher's embedding."""
    a = step.losses.features * _falling(progress)
    return {"embedding": 1 - a, "stream": a, "previous": a}


def embedding_alone(progress: float, step: Distill) -> Weights:
    """The embedding, which is the goal, and nothing besides."""
    return {"embedding": 1.0}


def _falling(progress: float) -> float:
    """From 10/11 to 0 over the first half, an epoch at a time."""
    epoch = int(progress * EPOCHS + 1e-6)
    return (epoch < 11) * (10 - epoch) / 11


ALIGN: dict[str, Callable[[float, Distill], Weights]] = {
    "none": embedding_alone,
    "bottleneck": bottleneck,
    "stream": stream,
    "stream+embedding": stream_and_embedding,
}


def terms(distill: Distill, step: int, steps: int) -> Weights:
    """The terms of the loss that count in an optimizer step, counted from 0, with their weights."""
    losses = distill.losses
    weights = ALIGN[distill.align](step / steps, distill)
    views = {"direction": losses.direction, "masks": losses.masks}
    if "mask_decoder" in distill.train:
        views["iou"] = losses.masks  # what the decoder predicts of its masks shall stay true
    return {name: float(weight) for name, weight in (weights | views).items() if weight}


def aligns(distill: Distill) -> bool:
    """Whether features of the model before the cut are compared, at least in the beginning."""
    return not set(terms(distill, 0, 1)) <= {"embedding", "direction", "masks", "iou"}
