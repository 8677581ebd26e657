"""Keeps results as lines of JSON, each with what is needed to trust it, and the tables made from them."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from slimsam_jax.errors import InputError
from slimsam_jax.files import replacing

ELSEWHERE = "SLIMSAM_JAX_RESULTS"  # variable of the environment: a folder to keep results in, for `spot_checks`
CHECKOUT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get(ELSEWHERE) or CHECKOUT / "experiments" / "results")
TABLE_FOLDER = Path(__file__).parent / "tables"
FIGURE_FOLDER = FOLDER.parent / "figures"
NAMES = {  # of teachers, by their files and folders
    "sam_small_256": "small v1",
    "sam_small_v2": "small v2",
    "hiera_small": "small SAM 2",
}
NOTE = "`{command}` writes this file: do not edit it. [{label}]({page}) says what it means."


@functools.cache
def machine() -> dict[str, Any]:
    """Records where and with what a number was made."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": version("jax"),
        "commit": commit(),
    }


def commit() -> str:
    """Returns the commit of the checkout, with "-dirty" if a Python file differs from it or is new."""
    git = lambda *arguments: subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=CHECKOUT)
    changed = git("status", "--porcelain", "--", ":/*.py").stdout.strip()
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")


def check_committed() -> None:
    """Raises InputError if results would be of code that no commit holds; what is appended then names this commit."""
    machine.cache_clear()
    if not (name := machine()["commit"]) or name.endswith("-dirty"):
        raise InputError(
            f"the code is no commit's ({name or 'no git here'}); commit it, so that rows say what made them"
        )


def append(path: Path, entry: dict[str, Any]) -> None:
    """Adds a line; several processes may."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({**entry, "machine": machine()}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the entries that agree with `key`."""
    return [entry for entry in read(path) if all(entry.get(name) == value for name, value in key.items())]


def called(model: str) -> str:
    """Returns what tables call a model whose file or folder has this name."""
    return NAMES.get(model, model)


def write_table(name: str, title: str, lines: Sequence[str], command: str, page: str) -> None:
    """Writes experiments/tables/NAME.md, all of it.

    Args:
      name: of the file, without its suffix.
      title: the heading.
      lines: of the Markdown table, its head first.
      command: that writes this file.
      page: where the table is explained, relative to it: "../slimming.md", say.
    """
    TABLE_FOLDER.mkdir(exist_ok=True)
    note = NOTE.format(command=command, page=page, label=page.removeprefix("../"))
    with replacing(TABLE_FOLDER / f"{name}.md") as temporary:
        temporary.write_text("\n".join([f"# {title}", "", note, "", *lines, ""]))
