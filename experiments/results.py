"""Results as lines of JSON, each with what is needed to trust it; sections of experiments/README.md made from them."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from slimsam_jax.files import replacing

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"


@functools.cache
def machine() -> dict[str, Any]:
    """Where and with what a number was made."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=FOLDER.parent)
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": version("jax"),
        "commit": git.stdout.strip(),
    }


def append(path: Path, entry: dict[str, Any]) -> None:
    """Adds a line; several processes may."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({**entry, "machine": machine()}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries that agree with `key`."""
    return [entry for entry in read(path) if all(entry.get(name) == value for name, value in key.items())]


def write_section(name: str, text: str) -> None:
    """Replaces what stands between the marks of a section in experiments/README.md."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, found, rest = README.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{README} has no marks for the section {name}")
    with replacing(README) as temporary:
        temporary.write_text(before + begin + text + end + after)
