"""Checks a data set: what it holds, and what is wrong with it."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from PIL import Image

from slimsam_jax.data.reading import prefetched
from slimsam_jax.data.sample import Annotation, Sample
from slimsam_jax.errors import InputError, printable
from slimsam_jax.imaging.draw import draw_masks, draw_prompts, sheet
from slimsam_jax.imaging.geometry import bounding_window
from slimsam_jax.progress import track

SHEET = 12  # images on a sheet


class Findings(NamedTuple):
    """Result of checking one sample.

    Attributes:
      size: (height, width), or None if the image cannot be read.
      masks: how many; None if it is not annotated, or not readably.
      problems: one line each.
    """

    size: tuple[int, int] | None
    masks: int | None
    problems: list[str]


def check(samples: Sequence[Sample], threads: int = 4) -> list[Findings]:
    """Reads every image and every annotation. Returns the findings of each sample."""
    return [found() for _, found in prefetched(examine, track(samples, "check"), threads)]


def check_together(samples: Sequence[Sample]) -> list[Findings]:
    """`check` by all processes, each with its share of the samples; returns the same in all of them.

    Raises:
      InputError: they do not see the same samples.
    """
    from slimsam_jax.data.together import check_same, gathered, share  # which imports JAX

    check_same(samples)
    rows = gathered(check(share(samples)))
    return [Findings(size and tuple(size), masks, problems) for size, masks, problems in rows]


def examine(sample: Sample) -> Findings:
    try:
        image = sample.image()
    except InputError as error:
        return Findings(None, None, [str(error)])
    size = image.height, image.width
    if not sample.load_annotations:
        return Findings(size, None, [])
    try:
        masks, problems = contradictions(sample.each_annotation(size), size)
    except InputError as error:
        return Findings(size, None, [str(error)])
    return Findings(size, masks, [f"{printable(sample.name)}: {line}" for line in problems])


def contradictions(annotations: Iterable[Annotation], size: tuple[int, int]) -> tuple[int, list[str]]:
    """Finds what cannot be true in the annotations of an image of `size` (height, width).

    Returns:
      how many annotations there are, and one line for each kind of problem.
    """
    problems: dict[str, list[int]] = collections.defaultdict(list)
    counts: collections.Counter[int] = collections.Counter()
    for annotation in annotations:
        counts[annotation.id] += 1
        for problem in _contradictions(annotation, size):
            problems[problem].append(annotation.id)
    repeated = [i for i, count in counts.items() if count > 1 and i >= 0]
    if repeated:
        problems["the same id more than once"] = repeated
    some = lambda ids: ", ".join(map(str, ids[:3])) + " ..." * (len(ids) > 3)
    return counts.total(), [f"{problem} (annotation {some(ids)})" for problem, ids in problems.items()]


def _contradictions(annotation: Annotation, size: tuple[int, int]) -> list[str]:
    height, width = size
    mask, (x0, y0, x1, y1), (x, y) = annotation.mask, annotation.box, annotation.point
    problems = []
    if not mask.any():
        problems.append("an empty mask")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        problems.append("a box that leaves the image")
    if not (0 <= x <= width and 0 <= y <= height):
        problems.append("a point outside of the image")
    if mask.any() and not _holds(annotation):
        problems.append("a box that does not hold its mask")
    return problems


def _holds(annotation: Annotation) -> bool:
    """Tells whether the mask lies in its box, give or take a pixel: formats count the last one or not."""
    rows, columns = bounding_window(annotation.mask)
    x0, y0, x1, y1 = annotation.box
    return x0 - 1 <= columns.start and y0 - 1 <= rows.start and columns.stop <= x1 + 2 and rows.stop <= y1 + 2


def describe(
    samples: Sequence[Sample], findings: Sequence[Findings], others: Sequence[str] = (), closed: Sequence[str] = ()
) -> list[str]:
    """Formats the findings as lines to print: counts first, then every problem.

    Args:
      others: names of files that nothing reads.
      closed: names of folders that are not looked into.
    """
    sizes = [f.size for f in findings if f.size]
    masks = [f.masks for f in findings if f.masks]
    lines = [f"images: {len(samples)} ({_kinds(sample.name for sample in samples if not sample.lost)})"]
    if sizes:
        areas = sorted(sizes, key=math.prod)
        smallest, middle, largest = (f"{w} x {h}" for h, w in (areas[0], areas[len(areas) // 2], areas[-1]))
        lines.append(f"pixels: {smallest} to {largest}, median {middle}")
    lines.append(f"annotated: {len(masks)} images with {sum(masks)} masks" if masks else "annotated: none")
    if others:
        lines.append(f"not read: {len(others)} ({_kinds(others)}); convert images among them to .jpg or .png")
    if closed:
        some = ", ".join(map(printable, closed[:3])) + " ..." * (len(closed) > 3)
        lines.append(f"not looked into: {len(closed)} folders, links or not yours to list: {some}")
    problems = [problem for f in findings for problem in f.problems]
    concerned = sum(bool(f.problems) for f in findings)
    lines.append(f"problems: {f'in {concerned} images' if problems else 'none'}")
    return lines + [f"  {problem}" for problem in problems]


def _kinds(names: Iterable[str]) -> str:
    """Counts endings, the ten most common ones: "12 .jpg, 3 .png"."""
    endings = (PurePath(name).suffix.lower() or "without suffix" for name in names)
    kinds = collections.Counter(printable(ending, 20) for ending in endings)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(10))


def draw_sheet(samples: Sequence[Sample], prompts: bool = True) -> Image.Image:
    """Draws up to `SHEET` images, spread over the samples, with their masks; unreadable ones are left out.

    Args:
      prompts: also points and boxes.
    """
    chosen = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, SHEET).astype(int))]
    tiles = [tile for sample in chosen if (tile := _tile(sample, prompts))]
    return sheet([image for image, _ in tiles], [title for _, title in tiles])


def _tile(sample: Sample, prompts: bool) -> tuple[Image.Image, str] | None:
    try:
        image = sample.image()
    except InputError:
        return None
    try:
        annotations = sample.annotations((image.height, image.width))
    except InputError:
        annotations = []
    largest_first = sorted(annotations, key=lambda a: -a.mask.sum())
    image = draw_masks(image, np.array([a.mask for a in largest_first]))
    if prompts:
        image = draw_prompts(image, [a.point for a in annotations], [a.box for a in annotations])
    return image, f"{PurePath(sample.name).name}: {len(annotations)} mask{'s' * (len(annotations) != 1)}"
