"""Reads tar shards, as SA-1B is published: in place, by the offsets that one walk over the headers gives.

What a walk gives is kept, see `shard_index`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from slimsam_jax.data.sample import MOST_BYTES, Sample, lost
from slimsam_jax.data.samples import Lazy, encoded
from slimsam_jax.data.sources import shard_index, tar_index
from slimsam_jax.data.sources.folder import MOST_OF_ANNOTATION, is_annotation, rows
from slimsam_jax.data.sources.shard_index import Table
from slimsam_jax.errors import InputError, printable
from slimsam_jax.files import IMAGE_SUFFIXES, open_regular

SUFFIXES = (".tar", ".tgz", ".gz")  # the compressed ones to be refused with a reason


class Shard(Lazy):
    """The images of a shard, sorted by name."""

    def __init__(self, path: Path, table: Table):
        self.path, self.table = path, table

    def __len__(self) -> int:
        return self.table.images

    def __getitem__(self, place: int) -> Sample:
        if not 0 <= place < self.table.images:
            raise IndexError(place)
        offset, size, beside, beside_size, _ = self.table.rows[place].tolist()
        load = functools.partial(_annotations, self.path, beside, beside_size) if beside >= 0 else None
        read = functools.partial(_read, self.path, offset, size, MOST_BYTES)
        return Sample(f"{self.path}/{self.table.name(place)}", read, load)

    def names(self, start: int, stop: int) -> bytes:
        listed = self.table.names_of(start, stop)
        try:
            listed.decode()
        except UnicodeDecodeError:
            return super().names(start, stop)
        if listed.count(b"\n") != stop - start - 1:  # names of several lines
            return super().names(start, stop)
        before = encoded(f"{self.path}/")
        return before + listed.replace(b"\n", b"\n" + before)

    def annotated(self) -> np.ndarray:
        return self.table.rows["beside"][: self.table.images] >= 0


def samples(paths: Sequence[Path]) -> dict[Path, list[Sequence[Sample]]]:
    """Lists all images of each shard, in lists. What is lost of a cut or damaged one is a last sample, which fails.

    So is one that is no tar, or a compressed one, in which nothing has an offset.
    """
    return {path: _samples(path, table) for path, table in shard_index.tables(paths, _table).items()}


def _samples(path: Path, table: Table | InputError) -> list[Sequence[Sample]]:
    if isinstance(table, InputError):
        return [[lost(str(path), str(table))]]
    if not table.entries and not table.fault:
        return [[lost(str(path), f"{printable(path)} is a tar without a file")]]
    if not table.fault:
        return [Shard(path, table)]
    if not table.end:
        how = "not an uncompressed tar", "unpack it with gunzip if it is packed"
        return [[lost(str(path), f"{printable(path)} is {how[0]} ({printable(table.fault)}); {how[1]}")]]
    where = f"{path} from byte {table.end} on"
    reason = "the tar ends or is damaged there; whatever follows is lost"
    said = f"{printable(where)} cannot be read ({printable(table.fault)}: {reason})"
    return [Shard(path, table), [lost(where, said)]]


def without_image(paths: Sequence[Path]) -> list[str]:
    """Lists the annotations in shards beside which there is no image."""
    names: list[str] = []
    for path, table in shard_index.tables(paths, _table).items():
        if isinstance(table, InputError):
            continue  # `samples` names it
        rows = range(table.images, len(table.rows))
        where = table.rows[["offset", "size"]].tolist() if rows else []
        names += [f"{path}/{table.name(row)}" for row in rows if _is_annotation(path, *where[row])]
    return names


def _table(file: BinaryIO) -> Table:
    """Walks over a tar."""
    index = tar_index.index(file)
    members = _members(index)
    images = sorted(name for name in members if _is_image(name))
    stems = {_stem(name) for name in images}
    alone = sorted(name for name in members if PurePosixPath(name).suffix == ".json" and _stem(name) not in stems)
    return shard_index.table(index, members, images, alone)


def _members(index: tar_index.Index) -> dict[str, tuple[int, int]]:
    """Returns {name: (offset, size)} of a tar, hidden files and folders left out; of two of the same name the last."""
    names = {str(PurePosixPath(name)): (offset, size) for name, offset, size in index.entries}
    return {name: where for name, where in names.items() if not _is_hidden(name)}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in name.split("/"))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _stem(name: str) -> PurePosixPath:
    return PurePosixPath(name).with_suffix("")


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
    except (ValueError, OSError):  # cut off, too large to be one, or out of reach
        return False
