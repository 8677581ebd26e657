"""Both sides of `experiments.bench --what everything`: all masks of photographs, ours and the original generator's.

Both have the small SAM of the package: the work depends on how many masks pass the filters, so weights must be trained.
Suppression is ours on both sides, as the original's is torchvision's, which has no CPU build on PyPI.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench.options import Options, Step
from slimsam_jax import data
from slimsam_jax.imaging import rle

FIELDS = {"pred_iou_thresh": 0.35, "stability_score_thresh": 0.55}  # which let a weak SAM through
SAME = 0.9  # IoU from which two masks are the same

Masks = list[dict[str, Any]]  # COCO's RLE


def make_step(options: Options) -> Step:
    photos = data.find([options.photos or data.embedded_images()])[: options.images]
    images = [np.asarray(photo.image()) for photo in photos]
    generate, peak = ours() if options.side == "jax" else original()
    where = f"{len(os.sched_getaffinity(0))} cores, {len(images)} photographs"
    return Step(lambda: [generate(image) for image in images], len(images), peak, where, encoded)


def encoded(of_images: list[list[dict[str, Any]]]) -> list[Masks]:
    """Encodes the records of each image as JSON can hold them."""
    return [[rle.encode(record["segmentation"]) for record in records] for records in of_images]


def ours() -> tuple[Callable, Callable[[], int]]:
    from converters.from_torch import load
    from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
    from slimsam_jax.profiling.memory import peak_memory

    return SamAutomaticMaskGenerator(load(data.embedded_teacher()), **FIELDS).generate, peak_memory


def original() -> tuple[Callable, Callable[[], int]]:
    import torch

    from experiments.bench.original import peak
    from slimsam_jax.inference import amg
    from tests.helpers import peers

    peers.segment_anything()  # before the next line needs it
    from converters import slim_sam_torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sam = slim_sam_torch.load(data.embedded_teacher()).to(device)
    return peers.mask_generator(sam, amg.nms, **FIELDS).generate, lambda: peak(device)


def agreement(ours: list[Masks], theirs: list[Masks]) -> str:
    """Says how many masks of each side have a partner on the other, in a line."""
    shares = [f"{share(a, b):.1%} of the {sum(map(len, a))}" for a, b in ((theirs, ours), (ours, theirs))]
    return f"IoU over {SAME} with one of the other side: {shares[0]} masks of the original's, {shares[1]} of ours"


def share(one: list[Masks], other: list[Masks]) -> float:
    """Computes the share of the masks of `one`, image by image, that `other` has too; 1 if there are none."""
    hits = [hit for a, b in zip(one, other, strict=True) for hit in partners(a, b)]
    return float(np.mean(hits)) if hits else 1.0


def partners(masks: Masks, others: Masks) -> np.ndarray:
    """Tells which of the n masks of an image have a partner, [n] bool."""
    if not masks or not others:
        return np.zeros(len(masks), bool)
    a, b = (np.stack([rle.decode(mask).ravel() for mask in side]).astype(np.float32) for side in (masks, others))
    shared = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - shared
    return (shared > SAME * union).any(1)
