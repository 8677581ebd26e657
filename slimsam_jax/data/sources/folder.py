"""Reads a folder of images at any depth; SA-1B's layout is one with a .json of the same name beside each."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from slimsam_jax.data.sample import MOST_BYTES, Sample, lost
from slimsam_jax.errors import InputError
from slimsam_jax.files import IMAGE_SUFFIXES, read_bytes

MOST_OF_ANNOTATION = 2**23  # bytes; a large one of SA-1B has one or two million
MOST_VALUES = 2**21  # in it: a value of two bytes takes a hundred in Python


class Contents(NamedTuple):
    """What lies below a folder, sorted, hidden files and folders left out.

    Attributes:
      samples: images, and folders that cannot be listed.
      tars: shards.
      alone: .json files beside which there is no image; of SA-1B or not.
      others: files that nothing reads, by their endings.
      closed: folders that are not looked into: links, and those of other users.
    """

    samples: list[Sample]
    tars: list[Path]
    alone: list[Path]
    others: list[Path]
    closed: list[str]


def contents(folder: Path) -> Contents:
    """Lists what lies below a folder, walked over once."""
    paths, unlisted, closed = walk(folder)
    files = [path for path, is_folder in paths if not is_folder]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    beside = {path.with_suffix(""): path for path, _ in paths if path.suffix.lower() == ".json"}  # of two the .json
    samples = [sample(path, beside.get(path.with_suffix(""))) for path in images] + [lost(*each) for each in unlisted]
    alone = sorted(beside[stem] for stem in beside.keys() - {path.with_suffix("") for path in images})
    others = [path for path in files if path.suffix.lower() not in {*IMAGE_SUFFIXES, ".json", ".tar"}]
    return Contents(samples, [path for path in files if path.suffix.lower() == ".tar"], alone, others, closed)


def walk(folder: Path) -> tuple[list[tuple[Path, bool]], list[tuple[str, str]], list[str]]:
    """Lists what is below a folder, sorted, hidden files and folders left out; links to folders are not followed.

    Returns:
      [(path, whether it is a folder)], [(folder, why it cannot be listed)], and the folders that are passed by: links,
      and those of other users, such as the lost+found of a disk.
    """
    paths, unlisted, closed, waiting = [], [], [], [str(folder)]
    while waiting:  # not recursively, which Python bounds: folders may be thousands deep
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):  # thumbnails and the like, of which no model shall learn
                        continue
                    paths.append((Path(entry.path), is_folder := _is_folder(entry)))
                    if is_folder:
                        (closed if entry.is_symlink() else waiting).append(entry.path)
        except PermissionError:
            closed.append(here)
        except OSError as error:
            unlisted.append((here, f"{here} cannot be listed: {error.strerror}"))
    return sorted(paths), sorted(unlisted), sorted(closed)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def sample(path: Path, beside: Path | None) -> Sample:
    """Makes a sample of an image and the SA-1B .json beside it, if there is one."""
    load = functools.partial(annotations, beside) if beside else None
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


def is_annotation_file(path: Path) -> bool:
    """Tells whether a file, which may be anything, is one of SA-1B's annotations."""
    try:
        return is_annotation(read_bytes(path, MOST_OF_ANNOTATION))
    except (InputError, OSError):  # a FIFO, a folder, too large to be one, or out of reach
        return False
