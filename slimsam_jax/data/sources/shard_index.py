"""Keeps what shards hold in small files of the user's cache, so that millions of headers are walked once.

There is one file a tar, good as long as that has the same size and time of change. Processes that start together, on
one machine or on several that share the folder, share the work: each walks tars in an order of its own, and passes by
those that another has finished meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from slimsam_jax.data.sources import tar_index
from slimsam_jax.errors import InputError
from slimsam_jax.files import cache_folder, keep_within, open_regular, read_bytes, regular, replacing
from slimsam_jax.progress import track

MAGIC = b"slimsam_jax shard 2\n"  # the first had what lies in hidden folders, too
ROW = np.dtype([(name, "<i8") for name in ("offset", "size", "beside", "beside_size")] + [("end", "<u4")])
KEPT_FROM = 200  # files in a tar: fewer are walked in milliseconds
ROOM = 2**31  # bytes of all these files: SA-1B's take 0.6 GB
MOST = 2**63 - 1
THREADS = 8  # that wait for disks
SHOWN_FROM = 2**30  # bytes of tars: they take long enough to say so
SETTLED = 2.0  # seconds since a tar has changed: until then it may change again within the tick of a clock


class Table(NamedTuple):
    """What a tar holds, as far as we read it.

    Attributes:
      rows: [n] of ROW: where a file lies, and its bytes; the same of the .json beside it, -1 of none; and where its
        name ends in `names`, which are one a line.
      names: UTF-8, or the bytes that a tar has instead.
      images: so many rows are images; the others are .json files beside which there is no image.
      entries: files of any kind.
      end, fault: see `tar_index.Index`.
    """

    rows: np.ndarray
    names: bytes
    images: int
    entries: int
    end: int
    fault: str

    def name(self, row: int) -> str:
        return self.names_of(row, row + 1).decode(errors="surrogateescape")

    def names_of(self, start: int, stop: int) -> bytes:
        """Returns the names of some rows, at least one, one a line."""
        begin = int(self.rows["end"][start - 1]) + 1 if start else 0
        return self.names[begin : int(self.rows["end"][stop - 1])]


Walk = Callable[[BinaryIO], Table]


def table(
    index: tar_index.Index, members: dict[str, tuple[int, int]], images: Sequence[str], alone: Sequence[str]
) -> Table:
    """Makes the table of a tar of the `members` {name: (offset, size)}: of images, and of .json files without one."""
    names = [*images, *alone]
    beside = [members.get(json_beside(name), (-1, -1)) for name in images] + [(-1, -1)] * len(alone)
    encoded = [name.encode(errors="surrogateescape") for name in names]
    ends = np.cumsum([len(name) + 1 for name in encoded], dtype=np.int64) - 1
    if len(ends) and ends[-1] >= 2**32:
        raise InputError("a tar with more than 4 GB of names")
    rows = np.empty(len(names), ROW)
    rows["end"] = ends
    for fields, pairs in ((("offset", "size"), map(members.__getitem__, names)), (("beside", "beside_size"), beside)):
        # A header may say anything; what lies beyond 2^63 cannot be read, as what lies beyond the tar's end.
        values = np.array([[min(number, MOST) for number in pair] for pair in pairs], np.int64).reshape(-1, 2)
        rows[fields[0]], rows[fields[1]] = values[:, 0], values[:, 1]
    return Table(rows, b"\n".join(encoded), len(images), len(index.entries), index.end, index.fault)


def json_beside(name: str) -> str:
    """Returns the name of the .json beside an image."""
    return f"{name.rpartition('.')[0]}.json"


def tables(paths: Sequence[Path], walk: Walk) -> dict[Path, Table | InputError]:
    """Returns what each tar holds, or why it cannot be opened: from the cache, or by walking over it.

    Args:
      walk: (an open tar, unbuffered) -> its table.
    """
    folder = cache_folder("shards") if paths else None
    result: dict[Path, Table | InputError] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for path, known in zip(paths, pool.map(lambda path: _known(folder, path), paths), strict=True):
            if known:
                result[path] = known
    missing = [path for path in paths if path not in result]
    random.Random(f"{platform.node()} {os.getpid()}").shuffle(missing)  # other processes walk in another order
    pool = ThreadPoolExecutor(THREADS)
    try:
        found = {pool.submit(_known_or_walked, folder, path, walk): path for path in missing}
        large = sum(map(_size, missing)) >= SHOWN_FROM
        for future in track(as_completed(found), "index", len(found), "tars") if large else as_completed(found):
            result[found[future]] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for all of them
    if folder and missing:
        keep_within(folder, ROOM)
    return result


def _size(path: Path) -> int:
    """Bytes on the disk: what is not there, in a sparse file, takes no time."""
    try:
        status = path.stat()
        return min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))
    except (OSError, ValueError):
        return 0


def _known_or_walked(folder: Path | None, path: Path, walk: Walk) -> Table | InputError:
    """What another process has kept meanwhile, else what a walk gives, which is kept."""
    if known := _known(folder, path):
        return known
    try:
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            if hasattr(os, "posix_fadvise"):  # a header here and there: nothing beside it need be read
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            found = walk(file.raw)
            after = os.fstat(file.fileno())
    except InputError as error:
        return error
    except OSError as error:  # of a disk or a network, in the midst of it
        return InputError(f"{path} cannot be read: {error.strerror or error}")
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if folder and same and found.entries >= KEPT_FROM and abs(time.time() - after.st_mtime) > SETTLED:
        try:
            with replacing(_file(folder, path)) as temporary:
                temporary.write_bytes(packed(found, after))
        except OSError:  # a full disk, say: it will be walked again
            pass
    return found


def _known(folder: Path | None, path: Path) -> Table | None:
    """Reads what is kept of a tar; None if there is nothing, of another state of it, or nothing sound."""
    if not folder:
        return None
    try:
        status, file = regular(path).stat(), _file(folder, path)
        found = unpacked(read_bytes(file, status.st_size + 2**16), status)
        os.utime(file)  # used: the oldest go first
        return found
    except (InputError, OSError, ValueError, RecursionError):  # of lists in lists
        return None


def _file(folder: Path, path: Path) -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]}.index"


def packed(found: Table, status: os.stat_result) -> bytes:
    """Makes the content of an index's file: a magic, a checksum of the rest, a line of JSON, rows and names."""
    counts = {"images": found.images, "entries": found.entries, "end": found.end, "fault": found.fault}
    line = {"size": status.st_size, "time": status.st_mtime_ns, "rows": len(found.rows), **counts}
    rest = b"\n".join([json.dumps(line).encode(), found.rows.tobytes() + found.names])
    return MAGIC + b"%08x\n" % zlib.crc32(rest) + rest


def unpacked(content: bytes, status: os.stat_result) -> Table:
    """Reads what `packed` gives; whatever it says is checked, for it may be damaged, or be somebody else's.

    Raises:
      ValueError: it is of another state of the tar, damaged, or contradicts itself.
    """
    start = len(MAGIC) + 9
    if not content.startswith(MAGIC) or content[start - 9 : start] != b"%08x\n" % zlib.crc32(content[start:]):
        raise ValueError("no index, or damaged")
    stop = content.index(b"\n", start, start + 2**12)
    line = json.loads(content[start:stop])
    numbers = [line.get(name) if isinstance(line, dict) else None for name in ("rows", "images", "entries", "end")]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or type(line.get("fault")) is not str:
        raise ValueError("counts that are none")
    if (line.get("size"), line.get("time")) != (status.st_size, status.st_mtime_ns):
        raise ValueError("of another state of the tar")
    rows, images, entries, end = numbers
    names = stop + 1 + rows * ROW.itemsize
    if not images <= rows <= entries or names > len(content):
        raise ValueError("more rows than there is room for")
    table = np.frombuffer(content, ROW, rows, stop + 1).copy()  # a view would keep the names twice
    found = Table(table, content[names:], images, entries, end, line["fault"])
    _check(found)
    return found


def _check(found: Table) -> None:
    """Raises ValueError unless names lie behind one another, and files where there may be some."""
    rows, ends = found.rows, found.rows["end"].astype(np.int64)
    if (np.diff(ends, prepend=-1) <= 0).any() or ends[-1:].tolist() != [len(found.names)] * bool(len(ends)):
        raise ValueError("names that are none")
    if (rows["offset"] < 0).any() or (rows["size"] < 0).any() or (rows["beside_size"][rows["beside"] >= 0] < 0).any():
        raise ValueError("a file at a negative offset")
