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
    pictures, annotated = _files(folder)
    return [sample(p, p.with_suffix("") in annotated) for p in pictures]


def without_picture(folder: Path) -> list[str]:
    """The annotations of SA-1B below it beside which there is no picture. Other .json files are none."""
    pictures, annotated = _files(folder)
    alone = annotated - {p.with_suffix("") for p in pictures}
    paths = sorted(p.with_name(f"{p.name}.json") for p in alone)
    return [str(path) for path in paths if is_annotation(path.read_bytes())]


def _files(folder: Path) -> tuple[list[Path], set[Path]]:
    """The pictures below it, and what has a .json, without that suffix."""
    files = sorted(p for p in folder.rglob("*") if not p.name.startswith("."))
    annotated = {p.with_suffix("") for p in files if p.suffix == ".json"}
    return [p for p in files if p.suffix.lower() in SUFFIXES], annotated


def sample(path: Path, annotated: bool) -> Sample:
    load = functools.partial(annotations, path.with_suffix(".json")) if annotated else None
    return Sample(str(path), path.read_bytes, load)


def annotations(path: Path) -> list[dict[str, Any]]:
    """Of an SA-1B .json."""
    return json.loads(path.read_bytes())["annotations"]


def is_annotation(content: bytes) -> bool:
    """Whether a .json is one of SA-1B's; COCO's list `images`, too."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "annotations" in fields and "images" not in fields
