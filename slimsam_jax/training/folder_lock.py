"""Locks a run's folder against a second run; the kernel lets go of the lock when the process dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from pathlib import Path
from typing import BinaryIO

from slimsam_jax.cli.checks import check_empty
from slimsam_jax.errors import InputError, printable


def check_run_folder(folder: Path, resume: bool) -> None:
    """Raises InputError unless a run can begin in `folder`, or go on there."""
    check_free(folder)
    unfinished = os.path.isfile(folder / "checkpoints" / "origin.json")
    if resume and not unfinished:
        finished = os.path.isfile(folder / "config.json")
        hint = "the one in it is finished" if finished else "leave --resume out to begin one in a new folder"
        raise InputError(f"{printable(folder)} holds no unfinished run to resume: {hint}")
    if unfinished and not resume:
        raise InputError(
            f"{printable(folder)} is not empty: --resume continues the unfinished run in it; or choose another folder"
        )
    if not resume:
        check_empty(folder)


PLACE = Path("checkpoints") / "lock"  # in the folder of a run
LONGEST = 200  # bytes of it that are read


class FolderLock:
    """The lock of one run's folder, from here until `release`, or until the process ends.

    Raises:
      InputError: another process has it, or a run of this one.
      OSError: it cannot be written.
    """

    def __init__(self, folder: Path):
        self.file: BinaryIO | None = _open(folder / PLACE)
        try:
            _take(self.file, folder)
        except InputError:
            self.release()
            raise
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self.file.flush()

    def release(self) -> None:
        if self.file:
            self.file.close()
        self.file = None


def check_free(folder: Path) -> None:
    """Raises InputError if a run in this folder is going on; a folder without one is free.

    Looks by a shared lock, so that processes which look at the same moment are not in each other's way.
    """
    if not os.path.isfile(folder / PLACE):
        return
    with contextlib.suppress(OSError), _open(folder / PLACE) as file:  # one that may not be read is reported later
        _take(file, folder, fcntl.LOCK_SH)


def _open(path: Path) -> BinaryIO:
    return path.open("a+b")


def _take(file: BinaryIO, folder: Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{printable(folder)} is in use by {_owner(file)}; wait until it has ended, or give another --out"
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(f"{printable(folder)} cannot be locked ({error.strerror}): start no other run in it", flush=True)


def _owner(file: BinaryIO) -> str:
    """Reads who wrote the lock, if a run of ours did."""
    file.seek(0)
    match = re.fullmatch(r"(process [0-9]{1,10} on [\w.-]{1,100})\n", file.read(LONGEST).decode(errors="replace"), re.A)
    return match[1] if match else "another process"
