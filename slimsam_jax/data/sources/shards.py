"""Reads tar shards, as SA-1B is published: in place, by the offsets that one walk over the headers gives."""

from __future__ import annotations

import functools
from pathlib import Path, PurePosixPath
from typing import Any

from slimsam_jax.data.sample import MOST_BYTES, Sample, lost
from slimsam_jax.data.sources import tar_index
from slimsam_jax.data.sources.folder import MOST_OF_ANNOTATION, is_annotation, rows
from slimsam_jax.data.sources.folder import SUFFIXES as IMAGES
from slimsam_jax.errors import InputError, printable
from slimsam_jax.files import open_regular

SUFFIXES = (".tar", ".tgz", ".gz")  # the compressed ones to be refused with a reason


def samples(path: Path) -> list[Sample]:
    """Lists all images of a shard, sorted by name. What is lost of a cut or damaged one is a last sample, which fails.

    So is one that is no tar, or a compressed one, in which nothing has an offset.
    """
    try:
        with open_regular(path) as file:
            index = tar_index.index(file)
    except InputError as error:
        return [lost(str(path), str(error))]
    members = _members(index)
    images = [_sample(path, name, members) for name in sorted(members) if _is_image(name)]
    if not index.entries and not index.fault:
        return [lost(str(path), f"{printable(path)} is a tar without a file")]
    if not index.fault:
        return images
    if not index.end:
        how = "not an uncompressed tar", "unpack it with gunzip if it is packed"
        return [lost(str(path), f"{printable(path)} is {how[0]} ({printable(index.fault)}); {how[1]}")]
    where = f"{path} from byte {index.end} on"
    reason = "the tar ends or is damaged there; whatever follows is lost"
    return [*images, lost(where, f"{printable(where)} cannot be read ({printable(index.fault)}: {reason})")]


def without_image(path: Path) -> list[str]:
    """Lists the annotations in a shard beside which there is no image."""
    try:
        with open_regular(path) as file:
            members = _members(tar_index.index(file))
    except InputError:
        return []  # `samples` names it
    images = {_stem(name) for name in members if _is_image(name)}
    alone = sorted(name for name in members if PurePosixPath(name).suffix == ".json" and _stem(name) not in images)
    return [f"{path}/{name}" for name in alone if _is_annotation(path, *members[name])]


def _members(index: tar_index.Index) -> dict[str, tuple[int, int]]:
    """Returns {name: (offset, size)} of a tar, hidden files left out; of two of the same name the last."""
    names = {str(PurePosixPath(name)): (offset, size) for name, offset, size in index.entries}
    return {name: where for name, where in names.items() if not PurePosixPath(name).name.startswith(".")}


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGES


def _stem(name: str) -> PurePosixPath:
    return PurePosixPath(name).with_suffix("")


def _sample(path: Path, name: str, members: dict[str, tuple[int, int]]) -> Sample:
    beside = members.get(str(PurePosixPath(name).with_suffix(".json")))
    load = functools.partial(_annotations, path, *beside) if beside else None
    return Sample(f"{path}/{name}", functools.partial(_read, path, *members[name], MOST_BYTES), load)


def _read(path: Path, offset: int, size: int, most: int) -> bytes:
    if size > most:
        raise ValueError(f"it has {size} bytes, and at most {most} are read")
    with open_regular(path) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"the tar ends {size - len(content)} bytes before it does")
    return content


def _annotations(path: Path, offset: int, size: int) -> list[dict[str, Any]]:
    return rows(_read(path, offset, size, MOST_OF_ANNOTATION))


def _is_annotation(path: Path, offset: int, size: int) -> bool:
    try:
        return is_annotation(_read(path, offset, size, MOST_OF_ANNOTATION))
    except ValueError:  # cut off, or too large to be one
        return False
