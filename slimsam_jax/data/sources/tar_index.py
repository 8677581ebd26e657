"""Indexes a tar by one walk over its headers; read as `tarfile` does, and as distrustful as that is not.

Sizes are never negative, so that offsets grow; what a header says of the next one (long names, PAX) is of bounded size.
"""

from __future__ import annotations

import tarfile
from typing import BinaryIO, NamedTuple

MOST_OF_HEADER = 2**20  # bytes of a long name or a PAX header
BLOCK = tarfile.BLOCKSIZE
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
PAX, PAX_OF_ALL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE


class Entry(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    size: int


class Index(NamedTuple):
    """The regular files of a tar, as far as it goes; where that is; and what is wrong there, "" at its proper end."""

    entries: list[Entry]
    end: int
    fault: str


def index(file: BinaryIO) -> Index:
    """Walks over the headers of an uncompressed tar; what it cannot follow ends the walk and is the `fault`."""
    entries: list[Entry] = []
    length = file.seek(0, 2)
    start, next_one = 0, {}  # where a file's first header lies, and what has been said of it
    offset = 0
    try:
        while offset < length:
            header, data = _header(file, offset)
            size = int(next_one.get(b"size", header.size))
            if size < 0:
                raise ValueError("a negative size")
            if header.type in (*PAX, PAX_OF_ALL, LONG_NAME, LONG_LINK):
                offset = data + _blocks(header.size)
                next_one |= _extended(file, header, data)
                continue
            if header.isreg():
                entries.append(Entry(_name(header, next_one), data, size))
            has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
            start = offset = data + _blocks(size) * has_data
            next_one = {}
    except tarfile.EOFHeaderError:
        return Index(entries, start, "" if start == offset else "its last header is of no file")
    except (tarfile.TarError, ValueError) as error:
        return Index(entries, start, str(error))
    return Index(entries, start, "it ends without a block of zeros")


def _header(file: BinaryIO, offset: int) -> tuple[tarfile.TarInfo, int]:
    """Reads the header at an offset. Returns it, and where its data begin."""
    file.seek(offset)
    block = file.read(BLOCK)
    header = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    data = offset + BLOCK
    if header.type == tarfile.GNUTYPE_SPARSE:
        more = block[482]
        while more and len(block) == BLOCK:
            block, data = file.read(BLOCK), data + BLOCK
            more = len(block) == BLOCK and block[504]
    return header, data


def _blocks(size: int) -> int:
    """Rounds a number of bytes up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _extended(file: BinaryIO, header: tarfile.TarInfo, data: int) -> dict[bytes, bytes]:
    """Reads the extended header of the file after it, by PAX's keywords. A header of all files is of no use."""
    if not 0 <= header.size <= MOST_OF_HEADER:
        raise ValueError(f"an extended header of {header.size} bytes")
    file.seek(data)
    content = file.read(header.size)
    if header.type == LONG_NAME:
        return {b"GNU name": content.partition(b"\0")[0]}
    return _records(content) if header.type in PAX else {}


def _records(content: bytes) -> dict[bytes, bytes]:
    """Parses PAX's records, "LENGTH KEY=VALUE\\n" again and again; LENGTH is of all of it, itself, too."""
    records, start = {}, 0
    while start < len(content) and content[start]:
        digits = content[start : start + 10].partition(b" ")[0]
        end = start + int(digits)
        if not start + len(digits) < end <= len(content) or not digits.isdigit() or content[end - 1 : end] != b"\n":
            raise ValueError("a damaged PAX header")
        key, _, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        records[key], start = value, end
    if not records.get(b"size", b"0").isdigit():
        raise ValueError("a PAX header with a size that is no number")
    return records


def _name(header: tarfile.TarInfo, said: dict[bytes, bytes]) -> str:
    if b"path" in said:
        return said[b"path"].decode("utf-8", "surrogateescape")
    return said[b"GNU name"].decode(tarfile.ENCODING, "surrogateescape") if b"GNU name" in said else header.name
