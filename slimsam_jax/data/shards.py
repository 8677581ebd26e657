"""Tar shards, as SA-1B is published: read in place, by the offsets that one walk over the headers finds."""

from __future__ import annotations

import functools
import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from slimsam_jax.data.folder import SUFFIXES as IMAGES
from slimsam_jax.data.folder import is_annotation
from slimsam_jax.data.sample import Sample
from slimsam_jax.errors import InputError

SUFFIXES = (".tar", ".tgz", ".gz")  # the compressed ones to be refused with a reason


def samples(path: Path) -> list[Sample]:
    """All pictures of a shard, sorted by name. What is lost of a cut or damaged shard is a last sample, which fails.

    Raises:
      InputError: not a tar, or a compressed one, in which nothing has an offset.
    """
    members, end = _members(path)
    pictures = sorted(name for name in members if PurePosixPath(name).suffix.lower() in IMAGES)
    found = [_sample(path, name, members) for name in pictures]
    if not _is_end(path, end):
        found.append(Sample(f"{path} from byte {end} on", _lost))
    return found


def without_picture(path: Path) -> list[str]:
    """The annotations in a shard beside which there is no picture."""
    members, _ = _members(path)
    pictures = {_stem(name) for name in members if PurePosixPath(name).suffix.lower() in IMAGES}
    alone = sorted(name for name in members if PurePosixPath(name).suffix == ".json" and _stem(name) not in pictures)
    return [f"{path}/{name}" for name in alone if is_annotation(_read(path, *members[name]))]


def _stem(name: str) -> PurePosixPath:
    return PurePosixPath(name).with_suffix("")


def _is_end(path: Path, offset: int) -> bool:
    """Whether there is the block of zeros that ends a tar."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _lost() -> bytes:
    raise ValueError("the tar ends or is damaged there; whatever follows is lost")


def _sample(path: Path, name: str, members: dict[str, tuple[int, int]]) -> Sample:
    beside = members.get(str(PurePosixPath(name).with_suffix(".json")))
    load = functools.partial(_annotations, path, *beside) if beside else None
    return Sample(f"{path}/{name}", functools.partial(_read, path, *members[name]), load)


def _members(path: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """{name: (offset, size)} of the files in a tar, as far as it goes, and the offset where it ends."""
    members: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not PurePosixPath(member.name).name.startswith("."):
                    members[str(PurePosixPath(member.name))] = member.offset_data, member.size
                end = tar.offset
    except tarfile.TarError as error:
        if not members:
            raise InputError(
                f"{path} is not an uncompressed tar ({error}); unpack it with gunzip if it is packed"
            ) from None
    return members, end


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"the tar ends {size - len(content)} bytes before it does")
    return content


def _annotations(path: Path, offset: int, size: int) -> list[dict[str, Any]]:
    return json.loads(_read(path, offset, size))["annotations"]
