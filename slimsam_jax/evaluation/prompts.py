"""Protocols: what a user would have pointed at, from the annotations of an image.

Each takes annotations and a seed, and gives one prompt per annotation, in pixels of the original
frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from slimsam_jax.data import Annotation
from slimsam_jax.inference.masks import Prompts, clicks_at
from slimsam_jax.models.prompt_encoder import prompt_points
from slimsam_jax.regions import deepest

NOISE, MOST_NOISE = 0.1, 20.0  # of a box's side, and pixels: Segment Anything (Kirillov et al. 2023), appendix A


def point(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    """SlimSAM's: the point that the annotation itself comes with."""
    return clicks_at(np.stack([a.point for a in annotations]))


def point_center(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    """The pixel deepest inside the mask."""
    return clicks_at(np.stack([deepest(a.mask)[0] for a in annotations]))


def box(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    return Prompts(*prompt_points(boxes=np.stack([a.box for a in annotations])))


def box_noisy(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    """A box as somebody draws it by hand. The noise follows from seed, annotation's id (else its index) and box."""
    numbers = [index if a.id < 0 else a.id for index, a in enumerate(annotations)]
    random = lambda a, number: np.random.default_rng((seed, number, *np.abs(a.box).astype(int)))
    pairs = zip(annotations, numbers, strict=True)
    return Prompts(*prompt_points(boxes=np.stack([noisy(a.box, a.mask.shape, random(a, n)) for a, n in pairs])))


def noisy(box: np.ndarray, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """A box x0, y0, x1, y1 with a normal error on each coordinate, inside its image of (height, width) pixels."""
    noise = random.normal(0, NOISE * np.tile(box[2:] - box[:2], 2)).clip(-MOST_NOISE, MOST_NOISE)
    height, width = shape
    return (box + noise).clip(0, [width, height, width, height])


PROMPTS: dict[str, Callable[..., Prompts]] = {
    "point": point,
    "point-center": point_center,
    "box": box,
    "box-noisy": box_noisy,
}
