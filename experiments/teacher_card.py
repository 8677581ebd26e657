"""What teachers know: masks by point, box and further clicks, and how well they judge their own masks.

    python -m experiments.teacher_card run slimsam_jax/assets/sam_small_v2 --images composites_val bsds_val --limit 100
    python -m experiments.teacher_card table

A row is of a model and a folder of annotated images. All outputs of a click are asked what they think their IoU is.
An object's side is the root of the share of the image that it covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from converters.from_torch import load_sam
from experiments import results
from slimsam_jax import checkpoint, cli, data
from slimsam_jax.data import Annotation
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.clicks import click_ious
from slimsam_jax.evaluation.protocols import PROMPTS
from slimsam_jax.imaging import overlap
from slimsam_jax.inference.decode import Encoded, decode_prompts, encode_image, original_masks
from slimsam_jax.models.sam import Sam
from slimsam_jax.progress import track

FILE = results.FOLDER / "teacher_card.jsonl"
CLICKS = 5
SIDES = (0.1, 0.2)  # a patch of an image of 256 px has 0.06
HEAD = (
    "| teacher | images | point | box | best of three | after 2, 3, 4, 5 clicks "
    "| by side, to 0.1, to 0.2, larger: point; box "
    "| predicted and true IoU of all outputs | "
    "off by: all, single mask |"
)


def run(models: Positional[tuple[Path, ...]], images: tuple[str, ...], limit: int = 100) -> None:
    """Measure what experiments/results/teacher_card.jsonl does not hold yet.

    Args:
      models: SAMs, called by the names of their files or folders.
      images: folders of annotated images.
      limit: images of each, the first.

    Raises:
      InputError: the code is no commit's, or something cannot be read.
    """
    if limit < 1:
        raise InputError(f"--limit {limit} must be at least 1")
    results.check_committed()
    for path in models:
        sam, digest = load_sam(path), checkpoint.sha256(path)
        for folder in images:
            samples = data.find([folder])[:limit]
            key = {"teacher": path.stem, "sha256": digest, "data": Path(folder).name, "images": len(samples)}
            if not results.find(FILE, key):
                results.append(FILE, key | measure(sam, samples))


def measure(sam: Sam, samples: Sequence[data.Sample]) -> dict[str, Any]:
    """Means over images of means over their annotations; "clicks" are the mIoUs after 1, 2, ... clicks.

    "by_side" are means over all objects of a size: how many, mIoU by point and by box; null of those that are none.
    """
    each = [of_image(sam, sample) for sample in track(samples, "images")]
    sides, *ious = np.concatenate([scores.pop("objects") for scores in each], axis=1)
    sizes = np.digitize(sides, SIDES)
    by_side = [[int(own.sum()), *(_mean(some[own]) for some in ious)] for own in (sizes == i for i in range(3))]
    means = {name: np.mean([scores[name] for scores in each], axis=0).tolist() for name in each[0]}
    return {**means, "by_side": by_side}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def of_image(sam: Sam, sample: data.Sample) -> dict[str, Any]:
    image, annotations = read_annotated(sample)
    encoded = encode_image(sam, image)
    ious, predicted = of_prompt(sam, encoded, annotations, "point")
    boxed, _ = of_prompt(sam, encoded, annotations, "box")
    return {
        "point_miou": ious[:, 0].mean(),
        "box_miou": boxed[:, 0].mean(),
        "oracle_miou": ious[:, 1:].max(1).mean(),
        "predicted": predicted.mean(),
        "true": ious.mean(),
        "off_by": np.abs(predicted - ious).mean(),
        "single_off_by": np.abs(predicted - ious)[:, 0].mean(),
        "clicks": click_ious(sam, encoded, annotations, CLICKS).mean(0),
        "objects": np.stack([[a.mask.mean() ** 0.5 for a in annotations], ious[:, 0], boxed[:, 0]]),
    }


def of_prompt(
    sam: Sam, encoded: Encoded, annotations: Sequence[Annotation], protocol: str
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the true and the predicted IoU, [annotations, outputs] each: the single mask first."""
    low, predicted = decode_prompts(sam, encoded, PROMPTS[protocol](annotations))
    masks = (original_masks(sam, encoded, logits) for logits in low)
    ious = [overlap.iou(several, a.mask[None]) for several, a in zip(masks, annotations, strict=True)]
    return np.stack(ious), predicted


def table() -> None:
    """Write experiments/tables/teacher_card.md, once there are rows."""
    lines = [HEAD, "|---" * 9 + "|"]
    last = {(entry["data"], entry["teacher"]): entry for entry in results.read(FILE)}  # the newest of a name
    if not last:
        return
    lines += [_line(last[key]) for key in sorted(last)]
    title, command = "What teachers know", "python -m experiments.teacher_card table"
    results.write_table("teacher_card", title, lines, command, "../reference_teacher.md")


def _line(entry: dict[str, Any]) -> str:
    percent = lambda value: "" if value is None else f"{100 * value:.1f}"
    single = [percent(entry[f"{name}_miou"]) for name in ("point", "box", "oracle")]
    clicks = ", ".join(map(percent, entry["clicks"][1:]))
    off_by = f"{percent(entry['off_by'])}, {percent(entry['single_off_by'])}"
    sure = f"{percent(entry['predicted'])}, {percent(entry['true'])} | {off_by}"
    _, *by_side = zip(*entry["by_side"], strict=True)
    sides = "; ".join(", ".join(map(percent, some)) for some in by_side)
    images = f"{entry['images']} of {entry['data']}"
    return f"| {results.called(entry['teacher'])} | {images} | {' | '.join(single)} | {clicks} | {sides} | {sure} |"


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
