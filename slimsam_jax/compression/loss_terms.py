"""Which terms a distillation's loss has at each optimizer step, and their weights (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from slimsam_jax.compression.steps import Distill
from slimsam_jax.distillation.losses import Weights
from slimsam_jax.models.encoders import FAMILIES

Names = Mapping[str, Sequence[str]]
SAM = FAMILIES["vit"].FEATURES  # the paper's
EPOCHS = 20  # the schedules below are written in the reference's 20 epochs, whatever the number of steps


def bottleneck(progress: float, step: Distill, names: Names) -> Weights:
    """First half: embedding and bottleneck features by halves; second half: the embedding alone."""
    a = 0.5 * step.losses.features * (progress < 0.5)
    silent = "qkv_global" if step.quirks.self_aligned_global else None
    return {"embedding": 1 - a, **{name: a * (name != silent) for name in names["embedding"]}}


def stream(progress: float, step: Distill, names: Names) -> Weights:
    """From the residual stream of the model before the cut over to the teacher's embedding."""
    a = step.losses.features * _falling(progress)
    return {"embedding": 1 - a, **dict.fromkeys(names["bottleneck"], a)}


def stream_and_embedding(progress: float, step: Distill, names: Names) -> Weights:
    """From residual stream and embedding of the model before the cut over to the teacher's embedding."""
    a = step.losses.features * _falling(progress)
    return {"embedding": 1 - a, **dict.fromkeys(names["bottleneck"], a), "previous": a}


def embedding_alone(progress: float, step: Distill, names: Names) -> Weights:
    """What is wanted in the end, and nothing besides."""
    return {"embedding": 1.0}


def _falling(progress: float) -> float:
    """From 10/11 to 0 over the first half, an epoch at a time."""
    epoch = int(progress * EPOCHS + 1e-6)
    return (epoch < 11) * (10 - epoch) / 11


ALIGN: dict[str, Callable[[float, Distill, Names], Weights]] = {
    "none": embedding_alone,
    "bottleneck": bottleneck,
    "stream": stream,
    "stream+embedding": stream_and_embedding,
}


def terms(distill: Distill, step: int, steps: int, names: Names = SAM) -> Weights:
    """The terms of the loss that count in an optimizer step, counted from 0, with their weights.

    Args:
      names: `FEATURES` of the encoder's family.
    """
    losses = distill.losses
    weights = ALIGN[distill.align](step / steps, distill, names)
    views = {"direction": losses.direction, "masks": losses.masks}
    if "mask_decoder" in distill.train:
        views["iou"] = losses.masks  # what the decoder predicts of its masks shall stay true
    return {name: float(weight) for name, weight in (weights | views).items() if weight}


def aligns(distill: Distill) -> bool:
    """Whether features of the model before the cut are compared, at least in the beginning."""
    return not set(terms(distill, 0, 1)) <= {"embedding", "direction", "masks", "iou"}
