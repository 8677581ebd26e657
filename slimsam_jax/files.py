"""Opens foreign files, only regular ones of bounded size; writes ours, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from slimsam_jax.errors import InputError, reading

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}  # of what is an image in a folder


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success, removes it on failure."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` on success, and is removed on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    with UMASK:  # between the two calls another thread would read, and then leave behind, a mask of 0
        mask = os.umask(0)
        os.umask(mask)
    return mask


UMASK = threading.Lock()
# Lists in lists take thirty times their text once they are parsed. A model's description has 10 kB.
JSON_LIMIT = 1 << 20


def regular(path: Path | str) -> Path:
    """Returns the path itself, if it leads to a regular file; nothing is opened.

    Raises:
      InputError: it is missing or out of reach, or a folder, FIFO, socket or device (or a link to one).
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a {_kind(mode)}, and a file is needed")
    return path


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file for reading bytes; the caller closes it.

    Raises:
      InputError: `path` does not lead to a regular file, or one that may not be read.
    """
    path = regular(path)
    try:
        # What replaced the file since it was looked at must not hang us: a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path | str, limit: int) -> bytes:
    """Reads the whole content of a regular file of at most `limit` bytes.

    Raises:
      InputError: `path` does not lead to a readable regular file, or to a larger one.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # As much as there is, and not as much as there may be: Python allocates what it is asked to read.
        content = file.read(size + 1) if size <= limit else b""
        if len(content) > size:  # it grows, or is of a file system that knows no sizes, as /proc
            content += file.read(limit + 1 - len(content))
    if (size := max(size, len(content))) > limit:
        raise InputError(f"{path} has {size} bytes, and at most {limit} are read")
    return content


def read_json(path: Path | str, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Reads a JSON file of at most `limit` bytes that holds an object.

    Raises:
      InputError: `path` leads to no such file.
    """
    text = read_bytes(path, limit)
    with reading(path):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def cache_folder(*names: str) -> Path | None:
    """Makes a folder in the user's cache, whose files will be trusted; None if it cannot be, or others can change it.

    Args:
      names: of it, and of those above it, below `slimsam_jax`.
    """
    try:
        folder = user_cache().joinpath("slimsam_jax", *names)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_ours_alone(folder):
            return folder
        print(f"nothing is kept in {str(folder)!r}: others could change it", file=sys.stderr)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home folder; ValueError: a null byte in its name
        pass
    return None


def user_cache() -> Path:
    """Returns the cache folder by the XDG Base Directory Specification, which has relative paths ignored."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def keep_within(folder: Path, room: int) -> None:
    """Removes the files of a folder that were used longest ago, beyond `room` bytes of all."""
    found = sorted(_statuses(folder).items(), key=lambda file: -file[1].st_mtime)
    total = 0
    for path, status in found:
        total += status.st_size
        if total > room:
            path.unlink(missing_ok=True)


def _statuses(folder: Path) -> dict[Path, os.stat_result]:
    """Returns {path: status} of what is in a folder; other processes write there, too, and files come and go."""
    statuses = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            statuses[path] = path.lstat()
    return statuses


def _is_ours_alone(folder: Path) -> bool:
    """Tells whether nobody else can write here, who could have any code run. What is no plain file would block."""
    if os.name != "posix":
        return True
    here = folder.stat()
    files = _statuses(folder).values()
    plain = all(stat.S_ISREG(file.st_mode) and file.st_uid == os.getuid() for file in files)
    return plain and here.st_uid == os.getuid() and not here.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
