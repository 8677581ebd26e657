"""Makes prompts from the annotations of an image: what a user would have pointed at.

Each protocol takes annotations and a seed, and gives one prompt per annotation, in pixels of the original
frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from slimsam_jax.data import Annotation
from slimsam_jax.imaging.geometry import interior_point
from slimsam_jax.imaging.prompts import Prompts, clicks_at, noisy, prompt_points


def point(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    """Makes SlimSAM's prompts: the point that the annotation itself comes with."""
    return clicks_at(np.stack([a.point for a in annotations]))


def point_center(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    """Makes a click at the interior point of each mask."""
    return clicks_at(np.stack([interior_point(a.mask)[0] for a in annotations]))


def box(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    return Prompts(*prompt_points(boxes=np.stack([a.box for a in annotations])))


def box_noisy(annotations: Sequence[Annotation], seed: int = 0) -> Prompts:
    """Makes hand-drawn boxes. The noise follows from seed, annotation's id (else its index) and box."""
    numbers = [index if a.id < 0 else a.id for index, a in enumerate(annotations)]
    random = lambda a, number: np.random.default_rng((seed, number, *np.abs(a.box).astype(int)))
    pairs = zip(annotations, numbers, strict=True)
    return Prompts(*prompt_points(boxes=np.stack([noisy(a.box, a.mask.shape, random(a, n)) for a, n in pairs])))


PROMPTS: dict[str, Callable[..., Prompts]] = {
    "point": point,
    "point-center": point_center,
    "box": box,
    "box-noisy": box_noisy,
}
