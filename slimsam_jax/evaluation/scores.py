"""Scores one image: mask IoU by protocol, agreement between models, error of the embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from slimsam_jax.data import Annotation
from slimsam_jax.evaluation.clicks import click_scores
from slimsam_jax.evaluation.proposals import proposal_scores
from slimsam_jax.evaluation.protocols import PROMPTS
from slimsam_jax.imaging import overlap
from slimsam_jax.imaging.prompts import Prompts, clicks_at, point_grid
from slimsam_jax.inference.decode import Encoded, decode_prompts, original_masks
from slimsam_jax.inference.ranking import ranking
from slimsam_jax.models.sam import Embedding, Sam


def relative_error(embedding: Embedding, target: Embedding) -> float:
    """Computes the mean squared error over the target's variance: 0 is equal, 1 as bad as its mean everywhere.

    Of an embedding of several maps the mean of theirs.
    """
    if isinstance(target, dict):
        return float(np.mean([relative_error(embedding[name], target[name]) for name in target]))
    embedding, target = np.asarray(embedding), np.asarray(target)
    return float(np.square(embedding - target).mean() / target.var())


SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # COCO's, pixels of a mask
LABELLED = (*PROMPTS, "clicks", "everything")  # protocols that need annotations

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Protocols:
    """What to measure, and its choices.

    Attributes:
      names: of `LABELLED`, or "agreement".
      clicks: per annotation, for "clicks".
      grid: "agreement" is over grid x grid points.
      points_per_side: asked for "everything"; Segment Anything takes 64.
      seed: of the noise on boxes.
    """

    names: tuple[str, ...] = ("point", "box")
    clicks: int = 10
    grid: int = 4
    points_per_side: int = 32
    seed: int = 0


def image_scores(
    sams: Sequence[Sam], encoded: Sequence[Encoded], annotations: Sequence[Annotation], protocols: Protocols
) -> list[Scores]:
    """Scores an image by all protocols, for each of several models: {"point/iou": mean over annotations, ...}.

    Args:
      encoded: the image, by each model.
      annotations: [] leaves out the protocols that need them.
    """
    pairs = list(zip(sams, encoded, strict=True))
    areas = np.array([a.mask.sum() for a in annotations])
    scored: list[Scores] = [{} for _ in sams]
    for protocol in protocols.names:
        if protocol == "agreement":
            measured = [{"iou": float(ious.mean())} for ious in agreement(pairs, protocols.grid)]
        elif not annotations:
            continue
        elif protocol == "everything":
            measured = [proposal_scores(*pair, annotations, protocols.points_per_side) for pair in pairs]
        elif protocol == "clicks":
            measured = [click_scores(*pair, annotations, protocols.clicks) for pair in pairs]
        else:
            prompts = PROMPTS[protocol](annotations, protocols.seed)
            measured = [means_by_size(prompt_scores(*pair, annotations, prompts), areas) for pair in pairs]
        for scores, new in zip(scored, measured, strict=True):
            scores |= {f"{protocol}/{measure}": value for measure, value in new.items()}
    return scored


def means_by_size(values: dict[str, np.ndarray], areas: np.ndarray) -> Scores:
    """Averages over annotations; "iou" also over those of each size that there is."""
    means = {measure: float(scores.mean()) for measure, scores in values.items()}
    for size, (smallest, largest) in SIZES.items():
        chosen = (areas >= smallest) & (areas < largest)
        if chosen.any():
            means[f"iou_{size}"] = float(values["iou"][chosen].mean())
    return means


def prompt_scores(
    sam: Sam, encoded: Encoded, annotations: Sequence[Annotation], prompts: Prompts
) -> dict[str, np.ndarray]:
    """Computes IoU and boundary IoU [p] of one prompt per annotation.

    Three choices among the outputs: the single mask (`multimask_output=False`), the best of the others by predicted
    IoU (EdgeSAM's: by stability), and the best of them by true IoU (oracle).
    """
    low, predicted = decode_prompts(sam, encoded, prompts)
    overlaps = [_overlaps(sam, encoded, logits, a.mask) for logits, a in zip(low, annotations, strict=True)]
    iou, boundary = (np.stack(values) for values in zip(*overlaps, strict=True))
    rows = np.arange(len(iou))
    choices = {"": 0, "_best": 1 + ranking(sam, low, predicted)[:, 1:].argmax(1), "_oracle": 1 + iou[:, 1:].argmax(1)}
    return {
        f"{measure}{suffix}": values[rows, chosen]
        for measure, values in (("iou", iou), ("boundary", boundary))
        for suffix, chosen in choices.items()
    }


def _overlaps(sam: Sam, encoded: Encoded, low: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes IoU and boundary IoU [outputs] of one prompt's outputs [outputs, 4h, 4w]."""
    masks = original_masks(sam, encoded, low)
    return overlap.iou(masks, truth[None]), overlap.boundary_iou(masks, truth[None])


def single_mask_iou(sam: Sam, encoded: Encoded, annotations: Sequence[Annotation], protocol: str = "point") -> float:
    """Computes the single mask's IoU, mean over annotations: all that is needed while a model is learning."""
    low, _ = decode_prompts(sam, encoded, PROMPTS[protocol](annotations))
    masks = (original_masks(sam, encoded, logits[0]) for logits in low)
    return float(np.mean([overlap.iou(mask, a.mask) for mask, a in zip(masks, annotations, strict=True)]))


def agreement(pairs: Sequence[tuple[Sam, Encoded]], grid: int) -> list[np.ndarray]:
    """Computes the IoU [grid * grid] of each model's single masks with the first model's, for the same points."""
    prompts = clicks_at(point_grid(pairs[0][1].original_size, grid)[:, 0])
    low = [decode_prompts(*pair, prompts)[0][:, 0] for pair in pairs]
    ious = []
    for logits in zip(*low, strict=True):  # point by point: one mask per model in memory
        masks = np.stack([original_masks(*pair, one) for pair, one in zip(pairs, logits, strict=True)])
        ious.append(overlap.iou(masks, masks[:1]))
    return list(np.stack(ious, axis=1))
