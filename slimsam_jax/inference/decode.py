"""Predicts masks: the encoder runs once an image, then all prompts are decoded together."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from slimsam_jax import sharding
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.prompts import Prompts, prompt_points
from slimsam_jax.inference import fast_sam
from slimsam_jax.inference.engine import embed
from slimsam_jax.inference.fast_sam import Found
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.models.heads import kind_of
from slimsam_jax.models.kinds import Model
from slimsam_jax.models.sam import Embedding, Sam, decode, embedding_of

# Numbers of prompts that are ever compiled. Beyond 16 the decoder's activations leave a CPU's cache: a quarter slower.
BUCKETS = (1, 4, 16)
ACCELERATOR_BUCKETS = (1, 4, 16, 64)


class Encoded(NamedTuple):
    """An image after the encoder: its embedding [h, w, C] or dict of maps, size in the model frame, and own size."""

    embedding: Embedding
    size: tuple[int, int]
    original_size: tuple[int, int]


@functools.singledispatch
def encode_image(sam: Model, image: Image.Image) -> Encoded | Found:
    """Encodes an RGB image of any size; with a FastSAM, finds everything in it."""
    frame, size = sam.config.frame.place(image)
    embeddings = embed(sam, frame[None], size[None])
    return Encoded(embedding_of(embeddings, 0), tuple(int(side) for side in size), (image.height, image.width))


encode_image.register(FastSam, fast_sam.find_one)


@functools.singledispatch
def decode_prompts(
    sam: Model, encoded: Encoded | Found, prompts: Prompts, masks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes p prompts to all outputs, at the decoder's resolution.

    Args:
      masks: [p, 4h, 4w] logits of a previous mask of each prompt, or None.

    Returns:
      [p, 1 + multimask_outputs, 4h, 4w] logits and [p, 1 + multimask_outputs] predicted IoU. Of a FastSAM choices
      among its masks instead of logits, which `original_masks` takes, too; it does not read `masks`.

    Raises:
      InputError: the model cannot take such prompts.
    """
    check_labels(sam, prompts.labels, masks is not None)
    points = sam.config.frame.points(prompts.points, encoded.size, encoded.original_size)
    parts = []
    for index, count in padded(len(points)):
        previous = None if masks is None else masks[index][..., None]
        outputs = decode(sam.config, sam.params, encoded.embedding, points[index], prompts.labels[index], previous)
        parts.append([np.asarray(array)[:count] for array in outputs])
    low, scores = zip(*parts, strict=True)
    return np.concatenate(low), np.concatenate(scores)


decode_prompts.register(FastSam, fast_sam.decode_prompts)


@functools.singledispatch
def as_mask_input(sam: Model, low: np.ndarray) -> np.ndarray:
    """Clips logits [..., 4h, 4w] to what is given back as `masks` of a next prompt; SAM 2's head alone has bounds."""
    largest = getattr(kind_of(sam.config.head), "LARGEST_LOW_RES", np.inf)
    return np.clip(low, -largest, largest)


as_mask_input.register(FastSam, lambda model, choices: choices)  # which it does not read


def check_labels(sam: Model, labels: np.ndarray, masked: bool = False) -> None:
    """Raises InputError for prompts of labels [p, n], or with previous masks, that the model cannot take."""
    if reason := sam.refusal(labels, masked):
        raise InputError(reason)


def padded(count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Splits `count` prompts over buckets: (indices, padded by repetition to a bucket's size; how many are real)."""
    buckets = BUCKETS if sharding.platform() == "cpu" else ACCELERATOR_BUCKETS
    start = 0
    while start < count:
        size = next(size for size in reversed(buckets) if count - start >= 0.75 * size)
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)
        start += size


def predict_masks(
    sam: Sam, encoded: Encoded, points: np.ndarray | None = None, labels=None, boxes=None, mask: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Predicts the masks of p prompts in the original frame.

    Args:
      points: [p, n, 2] (x, y) in original pixels, or None.
      labels: [p, n], 1 foreground and 0 background; all foreground if None.
      boxes: [p, 4] x0, y0, x1, y1 in original pixels, or None.
      mask: which output: 0 is the single mask (`multimask_output=False`), 1.. the others.

    Returns:
      [p, h0, w0] bool masks and [p] predicted IoU.
    """
    if points is not None and labels is None:
        labels = np.ones(np.shape(points)[:2], np.int32)
    low, scores = decode_prompts(sam, encoded, Prompts(*prompt_points(points, labels, boxes)))
    return original_masks(sam, encoded, low[:, mask]), scores[:, mask]


@functools.singledispatch
def original_masks(sam: Model, encoded: Encoded | Found, low: np.ndarray) -> np.ndarray:
    """Resizes [..., 4h, 4w] logits to [..., h0, w0] bool masks; of float32 there is never more than one mask."""
    masks = np.empty((*low.shape[:-2], *encoded.original_size), bool)
    for index in np.ndindex(low.shape[:-2]):
        masks[index] = sam.config.frame.resize_masks(low[index], encoded.size, encoded.original_size) > 0
    return masks


original_masks.register(FastSam, fast_sam.original_masks)
