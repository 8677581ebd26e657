"""Which share of everything mode's masks to keep: quality against annotations for several shares.

`python -m experiments.thresholds --images bsds_train` prints such a table as `inference.calibration.USUAL` is from,
which was of the SAM that shipped before.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from converters.from_torch import load
from slimsam_jax import cli, data
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.inference import amg
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.calibration import Scores, Shares, fitting
from slimsam_jax.inference.candidates import unpack
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.sam import Sam
from slimsam_jax.progress import track

OF_ALL = (1.0, 0.5, 0.35, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)  # that pass by predicted IoU
OF_THOSE = (1.0, 0.7, 0.5, 0.35, 0.25)  # that are stable besides
MATCH, DUPLICATE = 0.5, 0.7  # IoU from which a mask is an annotation's; box IoU of the generator's suppression


class Candidates(NamedTuple):
    """Masks of an image: their scores, boxes [n, 4], and IoU with each annotation [n, annotations]."""

    scores: Scores
    boxes: np.ndarray
    ious: np.ndarray


def main(images: tuple[str, ...], model: Path | None = None, count: int = 50, points_per_side: int = 16) -> None:
    """Print a table.

    Args:
      images: annotated ones, as `evaluate` takes them.
      model: default: the SAM that ships.
      count: of images, spread evenly.
      points_per_side: of the grid.
    """
    sam, samples = load(model or data.embedded_teacher()), data.find(images)
    samples = samples[:: max(1, len(samples) // count)][:count]
    searched = [search(sam, sample, points_per_side) for sample in track(samples, "search")]
    together = Scores(*map(np.concatenate, zip(*(image.scores for image in searched), strict=True)))
    print("| by predicted IoU | and stable | precision | recall | F0.5 | masks an image | images without |")
    print("|---|---|---|---|---|---|---|")
    for one, other in itertools.product(OF_ALL, OF_THOSE):
        thresholds = fitting(together, Shares(one, one * other))
        print(f"| {one:g} | {one * other:.4g} | {' | '.join(quality(searched, thresholds))} |")


def search(sam: Sam, sample: data.Sample, points_per_side: int) -> Candidates:
    image, annotations = read_annotated(sample)
    encoded = encode_image(sam, image)
    nothing = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    masks = SamAutomaticMaskGenerator(sam, points_per_side, **nothing).candidates(encoded)
    truth = np.stack([annotation.mask for annotation in annotations])
    ious = [iou(unpack(masks, i, encoded.original_size)[None], truth) for i in range(len(masks.bits))]
    return Candidates(Scores(masks.predicted_iou, masks.stability), masks.boxes, np.array(ious))


def quality(searched: list[Candidates], thresholds: Thresholds) -> list[str]:
    """Cells of a row. F0.5 counts precision twice: who looks at a sheet sees masks of nothing, not those missed."""
    right, met = [], []
    for image in searched:
        kept = np.flatnonzero(image.scores.passing(thresholds))
        kept = kept[amg.nms(image.boxes[kept], image.scores.predicted_iou[kept], DUPLICATE)]
        right.append(image.ious[kept].max(1) > MATCH)
        met.append(image.ious[kept].max(0, initial=0) > MATCH)
    counts = np.array([len(of_image) for of_image in right])
    precision, recall = np.concatenate(right).mean() if counts.any() else 0.0, np.concatenate(met).mean()
    score = 1.25 * precision * recall / max(0.25 * precision + recall, 1e-9)
    return [f"{precision:.3f}", f"{recall:.3f}", f"{score:.3f}", f"{counts.mean():.1f}", f"{(counts == 0).mean():.2f}"]


if __name__ == "__main__":
    cli.run(main)
