"""A folder of pictures at any depth; SA-1B's layout is one with a .json of the same name beside each."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from slimsam_jax.data.sample import Sample

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def samples(folder: Path) -> list[Sample]:
    """All pictures below it, sorted, hidden files left out."""
    files = sorted(p for p in folder.rglob("*") if not p.name.startswith("."))
    annotated = {p.with_suffix("") for p in files if p.suffix == ".json"}
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
    return [sample(p, p.with_suffix("") in annotated) for p in pictures]


def sample(path: Path, annotated: bool) -> Sample:
    load = functools.partial(annotations, path.with_suffix(".json")) if annotated else None
    return Sample(str(path), path.read_bytes, load)


def annotations(path: Path) -> list[dict[str, Any]]:
    """Of an SA-1B .json."""
    return json.loads(path.read_bytes())["annotations"]
