"""Keeps compiled programs in the user's cache folder from one command to the next, and quiet about slow ones.

JAX's own variables come first: `JAX_COMPILATION_CACHE_DIR` names another folder, and with
`JAX_ENABLE_COMPILATION_CACHE=false` nothing is kept. Nothing here imports JAX, so that `--help` need not wait for it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import warnings
import zlib
from pathlib import Path

from slimsam_jax import files

ROOM = 2**28  # bytes; a run of `compress` on the small SAM keeps 2.3 MB
KEPT_FROM = 0.1  # seconds of compilation
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # its files begin so


def prepare() -> None:
    """Sets JAX's cache, at the beginning of a command; a library leaves its user's settings alone."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA calls a compilation of two minutes an error
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not (folder := cache_folder()):
        return
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": KEPT_FROM}
    for name, value in settings.items():
        os.environ.setdefault(name.upper(), str(value))
        if "jax" in sys.modules:  # which has read its variables already
            sys.modules["jax"].config.update(name, value)
    # A program that cannot be read or written is compiled; the next command removes what is damaged.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def cache_folder() -> Path | None:
    """Returns the folder for this machine's programs, tidied; None if there cannot be one, or not a safe one."""
    folder = files.cache_folder("programs", machine())
    try:
        if folder:
            tidy(folder, ROOM)
        return folder
    except OSError:
        return None


def machine() -> str:
    """Hashes the machine: programs are its code, and home folders are shared by machines of other code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")]
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *features]).encode()).hexdigest()[:16]


def tidy(folder: Path, room: int) -> None:
    """Removes new files that are damaged (JAX would not replace them), and the oldest beyond `room` bytes.

    Raises:
      OSError: the folder cannot be written.
    """
    stamp = folder / "tidied"
    before = stamp.stat().st_mtime if stamp.exists() else 0.0
    files = sorted(((path.stat(), path) for path in folder.glob("*-cache")), key=lambda file: -file[0].st_mtime)
    total = 0
    for status, path in files:
        total += status.st_size
        if total > room or (status.st_mtime >= before and not _is_whole(path)):
            path.unlink(missing_ok=True)
    stamp.touch()


def _is_whole(path: Path) -> bool:
    """Tells whether a file is whole, if it can: JAX compresses with zstandard if that is installed, else with zlib."""
    content = path.read_bytes()
    if not content.startswith(ZSTANDARD):
        try:
            zlib.decompress(content)
        except zlib.error:
            return False
        return True
    try:
        import zstandard
    except ImportError:  # somebody else's file: JAX cannot read it, either
        return True
    try:
        zstandard.ZstdDecompressor().decompress(content)
    except zstandard.ZstdError:
        return False
    return True
