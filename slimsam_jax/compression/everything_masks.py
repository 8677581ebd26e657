"""Masks for images without annotations: what the teacher finds everywhere in them, kept on disk.

A .json for each image, as SA-1B has them, named by the hash of the image; an interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slimsam_jax import sharding
from slimsam_jax.data import Sample
from slimsam_jax.data.prompted import learnable
from slimsam_jax.data.samples import Samples
from slimsam_jax.errors import InputError, RunError, reading, writing
from slimsam_jax.files import write_json
from slimsam_jax.imaging import rle
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.models.sam import Sam
from slimsam_jax.progress import track

SIDE = 16  # of the grid of points: a quarter of the original's 32 x 32, for several masks of an image are enough


def with_masks(samples: Sequence[Sample], teacher: Sam, folder: Path) -> Sequence[Sample]:
    """The samples that have masks to learn from: annotated ones as they are, others with the teacher's.

    Images in which it finds nothing to learn from are left out, and counted; each process searches its share. Of shards
    that are annotated throughout no sample is made.

    Args:
      folder: of the teacher's masks; made if it is not there.

    Raises:
      RunError: there is none.
    """
    if isinstance(samples, Samples) and len(samples.annotated()) == len(samples):
        return samples
    files = {sample: _file(folder, sample) for sample in samples if _is_bare(sample)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    share = list(files)[jax.process_index() :: jax.process_count()]
    missing = [sample for sample in share if files[sample] and _rows(files[sample]) is None]
    generator = SamAutomaticMaskGenerator(teacher, points_per_side=SIDE, output_mode="coco_rle")
    for sample in track(missing, "teacher's masks") if missing else ():
        _search(generator, sample, files[sample])
    sharding.barrier("teacher's masks")
    found = [_annotated(sample, files[sample]) if sample in files else sample for sample in samples]
    kept = [sample for sample in found if sample]
    if len(kept) < len(samples):
        print(f"{len(samples) - len(kept)} images are left out: the teacher finds nothing in them", flush=True)
    if not kept:
        raise RunError("the teacher finds nothing in any of the images; annotate some, or lower its thresholds")
    return kept


def name_of(teacher: Sam) -> str:
    """A folder's name, by what decides which masks a teacher finds, besides its weights."""
    thresholds = dataclasses.asdict(teacher.thresholds) if teacher.thresholds else None
    return f"masks-{hashlib.sha256(json.dumps([thresholds, SIDE]).encode()).hexdigest()[:8]}"


def _is_bare(sample: Sample) -> bool:
    """Whether an image has no annotations; of a TFDS nothing but reading tells. Damaged ones are named later."""
    if sample.load_annotations is None:
        return True
    try:
        with reading(sample.name):
            return not sample.load_annotations()
    except InputError:
        return False


def _file(folder: Path, sample: Sample) -> Path | None:
    """Of an image's masks; None if it cannot be read."""
    try:
        return folder / f"{hashlib.sha256(sample.read()).hexdigest()[:32]}.json"
    except InputError:
        return None


def _rows(file: Path) -> list[dict[str, Any]] | None:
    """What a file holds; None if it is not there or damaged."""
    try:
        with reading(file):
            return list(json.loads(file.read_text())["annotations"])
    except InputError:
        return None


def _search(generator: SamAutomaticMaskGenerator, sample: Sample, file: Path) -> None:
    try:
        image = sample.image()
    except InputError:
        return
    found, config = generator.generate(image), generator.model.config
    size = tuple(config.frame.place(image)[1])
    usable = [row for row in found if learnable(rle.decode(row["segmentation"]), size, config) is not None]
    with writing(file):
        write_json(file, {"annotations": usable})


def _annotated(sample: Sample, file: Path | None) -> Sample | None:
    """With the teacher's masks; None if there are none. An image that cannot be read stays, to be named later."""
    rows = _rows(file) if file else None
    if rows is None:
        return sample
    return dataclasses.replace(sample, load_annotations=lambda: _rows(file) or []) if rows else None
