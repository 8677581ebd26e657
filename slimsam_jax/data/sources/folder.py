"""Reads a folder of images at any depth; SA-1B's layout is one with a .json of the same name beside each."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from slimsam_jax.data.sample import MOST_BYTES, Sample, lost
from slimsam_jax.errors import InputError
from slimsam_jax.files import read_bytes

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
MOST_OF_ANNOTATION = 2**23  # bytes; a large one of SA-1B has one or two million
MOST_VALUES = 2**21  # in it: a value of two bytes takes a hundred in Python


def samples(folder: Path) -> list[Sample]:
    """Lists all images below a folder, sorted, hidden files left out."""
    paths, unlisted = walk(folder)
    images, annotated = _files(paths)
    unreadable = [lost(name, reason) for name, reason in unlisted]
    return [sample(p, p.with_suffix("") in annotated) for p in images] + unreadable


def without_image(folder: Path) -> list[str]:
    """Lists the annotations of SA-1B below a folder beside which there is no image. Other .json files are none."""
    images, annotated = _files(walk(folder)[0])
    alone = annotated - {p.with_suffix("") for p in images}
    paths = sorted(p.with_name(f"{p.name}.json") for p in alone)
    return [str(path) for path in paths if _is_annotation_file(path)]


def passed_by(folder: Path) -> list[str]:
    """Lists files below a folder that are read by nothing here, hidden ones left out: they end otherwise."""
    known = {*SUFFIXES, ".json", ".tar"}
    return [str(path) for path, is_folder in walk(folder)[0] if path.suffix.lower() not in known and not is_folder]


def tars(folder: Path) -> list[Path]:
    """Lists all shards below a folder, sorted, hidden ones left out."""
    return [path for path, is_folder in walk(folder)[0] if path.suffix == ".tar" and not is_folder]


def walk(folder: Path) -> tuple[list[tuple[Path, bool]], list[tuple[str, str]]]:
    """Lists what is below a folder, sorted, hidden files left out; links to folders are not followed.

    Returns:
      [(path, whether it is a folder)], and [(folder, why it cannot be listed)]; not of those of other users, such as
      the lost+found of a disk.
    """
    paths, unlisted, waiting = [], [], [str(folder)]
    while waiting:  # not recursively, which Python bounds: folders may be thousands deep
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    paths.append((Path(entry.path), _is_folder(entry)))
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except PermissionError:
            continue
        except OSError as error:
            unlisted.append((here, f"{here} cannot be listed: {error.strerror}"))
    return sorted((path, is_folder) for path, is_folder in paths if not path.name.startswith(".")), sorted(unlisted)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _files(paths: list[tuple[Path, bool]]) -> tuple[list[Path], set[Path]]:
    """Picks the images out of the paths of `walk`, and what has a .json, without that suffix."""
    annotated = {path.with_suffix("") for path, _ in paths if path.suffix == ".json"}
    return [path for path, is_folder in paths if path.suffix.lower() in SUFFIXES and not is_folder], annotated


def sample(path: Path, annotated: bool) -> Sample:
    load = functools.partial(annotations, path.with_suffix(".json")) if annotated else None
    return Sample(str(path), functools.partial(read_bytes, path, MOST_BYTES), load)


def annotations(path: Path) -> list[dict[str, Any]]:
    """Reads the annotations of an SA-1B .json.

    Raises:
      InputError, ValueError, KeyError, TypeError: it is none.
    """
    return rows(read_bytes(path, MOST_OF_ANNOTATION))


def rows(content: bytes) -> list[dict[str, Any]]:
    """Parses the annotations in the content of an SA-1B .json."""
    listed = _parse(content)["annotations"]
    if not isinstance(listed, list):
        raise ValueError("its annotations are no list")
    return listed


def is_annotation(content: bytes) -> bool:
    """Tells whether a .json is one of SA-1B's; COCO's list `images`, too."""
    try:
        fields = _parse(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "annotations" in fields and "images" not in fields


def _parse(content: bytes) -> Any:
    values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if values > MOST_VALUES:
        raise ValueError(f"about {values} values, more than annotations of an image have")
    return json.loads(content)


def _is_annotation_file(path: Path) -> bool:
    try:
        return is_annotation(read_bytes(path, MOST_OF_ANNOTATION))
    except InputError:  # a FIFO, a folder, or too large to be one
        return False
