"""Foreign files are opened here: only regular ones, and no more of them than the caller can hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from slimsam_jax.errors import InputError


def regular(path: Path | str) -> Path:
    """The path itself, if it leads to a regular file; nothing is opened.

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
    """The whole content of a regular file of at most `limit` bytes.

    Raises:
      InputError: `path` does not lead to a readable regular file, or to a larger one.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise InputError(f"{path} has {size} bytes, and at most {limit} are read")
    return content


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
